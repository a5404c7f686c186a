"""The PyTorch backend: any device, any of torch's floating types, no compiler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from unisd_kernels.backends.base import (
    DivergenceRows,
    LogitPair,
    NeedsGrad,
    RunningScores,
    ScoreGrads,
    Scores,
    ShardRows,
    SoftmaxRows,
    WholeRows,
)
from unisd_kernels.backends.buffers import equal_chunks
from unisd_kernels.backends.logit_divergence import LogitDivergence
from unisd_kernels.backends.projection import Projection
from unisd_kernels.backends.transform import LogitTransform

# Elementwise passes on a CPU run over blocks of this many bytes, so that a block is still in the cache at the next
# pass. Much smaller ones would pay for starting operations, larger ones would fall out of the cache.
_CPU_BLOCK_BYTES = 2 << 20
# Elsewhere blocks only bound the temporaries of the elementwise operations.
_DEVICE_BLOCK_BYTES = 64 << 20

# Scoring tiles: wide enough for an efficient product, small enough to stay near the cache.
_CPU_SCORE_TILE_BYTES = 32 << 20

# Far from float32's overflow at e^88; and e^-60 = 1e-26, the share of p_s there, makes nothing of an absolute error.
_LARGE_DELTA = 60.0
# With both shares of the mixture at least this large, one logarithm serves student and teacher.
_SMALL_SHARE = 1 / 16


class SavedDivergence(NamedTuple):
    """Values for `divergence_of_logits_backward`, [rows, V] each."""

    student: torch.Tensor  # the tile to write into
    student_probs: torch.Tensor
    factor: torch.Tensor | None  # the gradient is student_probs * factor; None: it stands in the tile (beta = 0)
    cap_gradient: torch.Tensor | None  # 1 - tanh^2, with a soft cap
    student_kl: torch.Tensor | None  # [rows] sum of the terms of KL(p_s || m), of a mixture


class SavedShard(NamedTuple):
    """A chunk's logits with what made them, for the rest of a divergence over a slice of a vocabulary."""

    logits: LogitPair
    student: LogitTransform
    teacher: LogitTransform
    beta: float


class Partition(NamedTuple):
    """Sums over the columns seen so far, [rows] each, relative to the largest logit: nothing depends on its size."""

    highest: torch.Tensor
    total: torch.Tensor  # sum_j e^(z_j - highest)
    moment: torch.Tensor | None  # sum_j e^(z_j - highest) (z_j - highest); for the entropy

    @classmethod
    def join(cls, blocks: list[Partition]) -> Partition:
        """One partition of the rows of several blocks."""
        moments = [block.moment for block in blocks if block.moment is not None]
        return cls(
            torch.cat([block.highest for block in blocks]),
            torch.cat([block.total for block in blocks]),
            torch.cat(moments) if moments else None,
        )

    def logsumexp(self) -> torch.Tensor:
        return self.highest + self.total.log()

    def wide_logsumexp(self) -> torch.Tensor:
        """In float64, where a large maximum takes no digit of the logarithm."""
        return self.highest.double() + self.total.double().log()

    def add(self, other: Partition) -> None:
        """Take further columns in, in place."""
        highest = torch.maximum(self.highest, other.highest)
        ours, theirs = self.highest - highest, other.highest - highest
        our_share, their_share = ours.exp(), theirs.exp()
        if self.moment is not None:
            assert other.moment is not None
            self.moment.add_(ours * self.total).mul_(our_share)
            self.moment.add_((other.moment + theirs * other.total).mul_(their_share))
        self.total.mul_(our_share).add_(other.total * their_share)
        self.highest.copy_(highest)


class TorchBackend:
    """PyTorch operations on logits (`base.LogitBackend`)."""

    name = "torch"
    stacks_views = False
    score_asserts_ids = False
    takes_delta = False
    joins_gradient = False
    row_padding = 0

    def multiplies_narrow(self, projection: Projection) -> bool:
        return False

    def chunk_rows(self, num_rows: int, most: int, weight_gradient: bool) -> int:
        return equal_chunks(num_rows, most)

    def block_rows(self, num_columns: int, device: torch.device) -> int:
        block_bytes = _CPU_BLOCK_BYTES if device.type == "cpu" else _DEVICE_BLOCK_BYTES
        return max(1, block_bytes // (4 * num_columns))

    def gradient_dtype(self, projection: Projection) -> torch.dtype:
        return projection.dtype

    def logits(self, projection: Projection, rows: slice, out: torch.Tensor) -> None:
        projection.logits(rows, out)

    def hidden_gradient(self, projection: Projection, gradient: torch.Tensor, out: torch.Tensor) -> None:
        projection.hidden_gradient(gradient, out)

    def add_weight_gradient(
        self, projection: Projection, gradient: torch.Tensor, rows: slice, out: torch.Tensor, first: bool
    ) -> None:
        projection.add_weight_gradient(gradient, rows, out, first)

    def score(
        self, projection: Projection, rows: slice, target_ids: torch.Tensor, running: RunningScores, tile_bytes: int
    ) -> None:
        """Over tiles of the vocabulary, by an online log-sum-exp."""
        device, dtype = target_ids.device, projection.dtype
        num_rows, num_columns = target_ids.shape[0], projection.num_columns
        if device.type == "cpu":
            tile_bytes = min(tile_bytes, _CPU_SCORE_TILE_BYTES)
        step = max(1, min(num_columns, tile_bytes // (num_rows * dtype.itemsize)))
        buffer = torch.empty(num_rows * step, dtype=dtype, device=device)
        seen: Partition | None = None
        for start in range(0, num_columns, step):
            width = min(step, num_columns - start)
            tile = buffer[: num_rows * width].view(num_rows, width)
            projection.logits(rows, tile, start, start + width)
            block = self.block_rows(width, device)
            here = Partition.join(
                [
                    _partition(tile[low : low + block], projection.transform, running.entropy is not None)
                    for low in range(0, num_rows, block)
                ]
            )
            if seen is None:
                seen = here
            else:
                seen.add(here)
            index = target_ids - start
            inside = (index >= 0) & (index < width)
            found = tile.gather(-1, index.clamp(0, width - 1).unsqueeze(-1)).squeeze(-1)
            running.target_logits.copy_(torch.where(inside, found, running.target_logits))

        assert seen is not None
        running.logsumexp.copy_(seen.logsumexp())
        if running.entropy is not None:
            assert seen.moment is not None
            torch.sub(seen.total.log(), seen.moment / seen.total, out=running.entropy)

    def scale_rows(self, rows: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # Straight into the narrow dtype: a float32 product of a weight's gradient is large.
        return torch.mul(rows, scale.unsqueeze(-1), out=torch.empty_like(rows, dtype=dtype))

    def divergence(
        self,
        student: Projection,
        teacher: Projection,
        beta: float,
        workspace_bytes: int,
        needs_grad: NeedsGrad,
        unit_weights: bool,
    ) -> LogitDivergence:
        return LogitDivergence(self, student, teacher, beta, workspace_bytes, needs_grad, unit_weights)

    def softmax(
        self, logits: torch.Tensor, gradient: torch.Tensor, transform: LogitTransform, target_ids: torch.Tensor
    ) -> SoftmaxRows:
        logsumexp = _partition(logits, transform, want_moment=False).logsumexp()
        target_logits = logits.gather(-1, target_ids.unsqueeze(-1)).squeeze(-1)
        cap_gradient = _cap_gradient(logits, transform)
        logits.sub_(logsumexp.unsqueeze(-1)).exp_()
        if cap_gradient is not None:
            logits.mul_(cap_gradient)
        return SoftmaxRows(logsumexp, target_logits)

    def score_backward(
        self,
        logits: torch.Tensor,
        gradient: torch.Tensor,
        transform: LogitTransform,
        target_ids: torch.Tensor,
        scores: Scores,
        grads: ScoreGrads,
    ) -> None:
        tile = logits
        _apply_softcap(tile, transform)
        cap_gradient = _cap_gradient(tile, transform)
        # d logp_y / dz = 1[y] - p,   d lse / dz = p,   d entropy / dz = -p (log p + entropy)
        probs_weight = torch.zeros_like(scores.logsumexp)
        if grads.logprobs is not None:
            probs_weight = probs_weight - grads.logprobs
        if grads.logsumexp is not None:
            probs_weight = probs_weight + grads.logsumexp
        tile.sub_(scores.logsumexp.unsqueeze(-1))
        if grads.entropy is not None:
            assert scores.entropy is not None
            probs = tile.exp()
            tile.add_(scores.entropy.unsqueeze(-1)).mul_(grads.entropy.unsqueeze(-1)).neg_()
            tile.add_(probs_weight.unsqueeze(-1)).mul_(probs)
        else:
            tile.exp_().mul_(probs_weight.unsqueeze(-1))
        if grads.logprobs is not None:
            tile.scatter_add_(-1, target_ids.unsqueeze(-1), grads.logprobs.to(tile.dtype).unsqueeze(-1))
        if cap_gradient is not None:
            tile.mul_(cap_gradient)

    def divergence_of_logits(
        self,
        logits: LogitPair,
        student_transform: LogitTransform,
        teacher_transform: LogitTransform,
        target_ids: torch.Tensor | None,
        beta: float,
        want_entropy: bool,
        with_gradient: bool,
        whole: WholeRows | None = None,
    ) -> tuple[DivergenceRows, SavedDivergence]:
        """`base.LogitBackend`'s. `whole`: the columns are a slice of this vocabulary; then the divergence is the sum
        over the slice, and the gradient the slice's part of the whole divergence's."""
        student, teacher, teacher_is_delta = logits
        assert teacher_is_delta is None
        _apply_softcap(student, student_transform)
        _apply_softcap(teacher, teacher_transform)
        cap_gradient = _cap_gradient(student, student_transform)
        if whole is None:
            # log_softmax reads and writes row by row, so writing over its input is safe.
            torch.log_softmax(student, -1, out=student)
            torch.log_softmax(teacher, -1, out=teacher)
        else:
            _subtract(student, whole.student_logsumexp)
            _subtract(teacher, whole.teacher_logsumexp)
        student_logprobs = teacher_logprobs = student_entropy = teacher_entropy = None
        if target_ids is not None:
            index = target_ids.unsqueeze(-1)
            student_logprobs = student.gather(-1, index).squeeze(-1)
            teacher_logprobs = teacher.gather(-1, index).squeeze(-1)

        teacher_probs = teacher.exp()
        if want_entropy:
            teacher_entropy = -_row_dot(teacher_probs, teacher)
        delta = teacher.sub_(student)  # log p_t - log p_s
        student_probs = student.exp()
        if want_entropy:
            student_entropy = -_row_dot(student_probs, student)
        # From here on the student's tile holds p_s - p_t: the gradient for beta = 0, and for the others a term that
        # sums to zero but for rounding. Adding it cancels the first-order effect on D of the rounding of the two
        # log-sum-exps, which otherwise drowns a small D (test_small_divergences_keep_their_digits). Summed after the
        # subtraction: the difference of two sums near one would bring back most of the rounding.
        torch.sub(student_probs, teacher_probs, out=student)
        factor = kl_student = None
        if beta == 0.0:
            divergence = _row_dot(teacher_probs, delta) + student.sum(-1)
        elif beta == 1.0:
            divergence = -(_row_dot(student_probs, delta) + student.sum(-1))
            constant = divergence if whole is None else whole.rows.divergence
            factor = delta.add_(constant.unsqueeze(-1)).neg_()
        else:
            u, v = _mixture_logs(delta, beta)
            kl_teacher = _row_dot(teacher_probs, v)
            kl_student = -_row_dot(student_probs, u)
            divergence = beta * kl_teacher + (1.0 - beta) * kl_student
            constant = kl_student if whole is None or whole.student_kl is None else whole.student_kl
            factor = u.add_(constant.unsqueeze(-1)).mul_(beta - 1.0)
        if whole is None:
            # A divergence is not negative; below zero there is only rounding. clamp keeps NaN.
            divergence = divergence.clamp(min=0.0)
        rows = DivergenceRows(divergence, student_logprobs, teacher_logprobs, student_entropy, teacher_entropy)
        return rows, SavedDivergence(student, student_probs, factor, cap_gradient, kl_student)

    def divergence_of_logits_backward(
        self,
        saved: SavedDivergence,
        target_ids: torch.Tensor | None,
        weight: torch.Tensor | None,
        logprob_weight: torch.Tensor | None,
    ) -> None:
        student = saved.student
        if saved.factor is not None:
            torch.mul(saved.student_probs, saved.factor, out=student)
        if weight is not None:
            student.mul_(weight.unsqueeze(-1))
        if logprob_weight is not None:
            student.addcmul_(saved.student_probs, logprob_weight.unsqueeze(-1), value=-1.0)
        if logprob_weight is not None:
            assert target_ids is not None
            # Another rank may have the target (-1).
            on_target = torch.where(target_ids >= 0, logprob_weight, 0.0)
            student.scatter_add_(-1, target_ids.clamp(min=0).unsqueeze(-1), on_target.unsqueeze(-1))
        if saved.cap_gradient is not None:
            student.mul_(saved.cap_gradient)

    def divergence_of_shard(
        self,
        logits: LogitPair,
        student: LogitTransform,
        teacher: LogitTransform,
        target_ids: torch.Tensor | None,
        beta: float,
        want_entropy: bool,
    ) -> tuple[ShardRows, SavedShard]:
        mixture = 0.0 < beta < 1.0
        own_beta = 0.0 if mixture else beta
        uncapped = replace(student, softcap=None), replace(teacher, softcap=None)
        parts = []
        for rows, copy in self._copies(logits):
            student_sum = _partition(copy.student, student, want_moment=False)
            teacher_sum = _partition(copy.teacher, teacher, want_moment=False)
            ids = None if target_ids is None else target_ids[rows].clamp(min=0)
            statistics, _ = self.divergence_of_logits(copy, *uncapped, ids, own_beta, want_entropy, False)
            divergence = None if mixture else statistics.divergence
            parts.append(
                ShardRows(student_sum.wide_logsumexp(), teacher_sum.wide_logsumexp(), divergence, *statistics[1:])
            )
        joined = [None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True)]
        return ShardRows(*joined), SavedShard(logits, student, teacher, beta)  # type: ignore[arg-type]

    def mixture_of_shard(self, saved: SavedShard, whole: WholeRows) -> torch.Tensor:
        parts = []
        for rows, copy in self._copies(saved.logits):
            transforms = saved.student, saved.teacher
            sums, terms = self.divergence_of_logits(
                copy, *transforms, None, saved.beta, False, False, whole.of_rows(rows)
            )
            assert terms.student_kl is not None
            parts.append(torch.stack([sums.divergence, terms.student_kl]))
        return torch.cat(parts, 1)

    def divergence_of_shard_backward(
        self,
        saved: SavedShard,
        whole: WholeRows,
        target_ids: torch.Tensor | None,
        weight: torch.Tensor | None,
        logprob_weight: torch.Tensor | None,
    ) -> None:
        for rows in self._row_blocks(saved.logits):
            logits, transforms = saved.logits.of_rows(rows), (saved.student, saved.teacher)
            _, terms = self.divergence_of_logits(
                logits, *transforms, None, saved.beta, False, False, whole.of_rows(rows)
            )
            of_rows = (None if value is None else value[rows] for value in (target_ids, weight, logprob_weight))
            self.divergence_of_logits_backward(terms, *of_rows)

    def _row_blocks(self, logits: LogitPair) -> Iterator[slice]:
        """Blocks of rows that stay in the cache from one pass to the next."""
        num_rows, num_columns = logits.student.shape
        step = self.block_rows(num_columns, logits.student.device)
        for start in range(0, num_rows, step):
            yield slice(start, min(start + step, num_rows))

    def _copies(self, logits: LogitPair) -> Iterator[tuple[slice, LogitPair]]:
        """Blocks that may be overwritten: the logits are still needed for the gradient."""
        for rows in self._row_blocks(logits):
            yield rows, LogitPair(logits.student[rows].clone(), logits.teacher[rows].clone(), None)


def _subtract(tile: torch.Tensor, logsumexp: torch.Tensor) -> None:
    """`tile -= logsumexp` of its rows, which is float64: in two parts, as its rounding to float32 would be that of a
    number larger than most differences."""
    high = logsumexp.to(tile.dtype)
    tile.sub_(high.unsqueeze(-1))
    if tile.dtype != logsumexp.dtype:
        tile.sub_((logsumexp - high).to(tile.dtype).unsqueeze(-1))


def _apply_softcap(tile: torch.Tensor, transform: LogitTransform) -> None:
    """The cap; and a row with a logit that is NaN or infinite becomes NaN whatever is made of it. Left alone, minus
    infinity would drop out of a softmax, and the cap would make either infinity a number."""
    # From [rows] values, so that it costs two cheap passes; one entry is enough for any sum of the row.
    finite = tile.amax(-1).isfinite() & tile.amin(-1).isfinite()
    tile[:, 0].masked_fill_(~finite, torch.nan)
    if transform.tanh_scale is not None:
        tile.tanh_().mul_(transform.tanh_scale)


def _partition(tile: torch.Tensor, transform: LogitTransform, want_moment: bool) -> Partition:
    """Partition of a [rows, columns] tile of scaled products, which are made logits in place."""
    _apply_softcap(tile, transform)
    highest = tile.amax(-1, keepdim=True)
    shifted = tile - highest
    moment = None
    if want_moment:
        exponentials = shifted.exp()
        moment = _row_dot(exponentials, shifted)
        total = exponentials.sum(-1)
    else:
        total = shifted.exp_().sum(-1)
    return Partition(highest.squeeze(-1), total, moment)


def _mixture_logs(delta: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`u = log(m / p_s)` and `v = log(p_t / m)` of `delta = log p_t - log p_s`, which they add up to. Finite for every
    finite delta, so nothing is NaN where both probabilities underflow."""
    if min(beta, 1.0 - beta) < _SMALL_SHARE:
        # One of them is next to nothing beside delta. p_s and p_t change places with beta and 1 - beta.
        u = _log_mixture(delta, beta, math.log(beta), math.log1p(-beta))
        return u, _log_mixture(-delta, 1.0 - beta, math.log1p(-beta), math.log(beta)).neg_()
    # From the larger of the two probabilities: the logarithm, of a number between 1/16 and 1, has all digits where the
    # probability is, and the rounding of delta counts where the other one is.
    teacher_is_larger = delta > 0
    other_share = torch.full_like(delta, beta).masked_fill_(teacher_is_larger, 1.0 - beta)
    from_larger = torch.expm1(delta.abs().neg_()).mul_(other_share).log1p_()
    u = torch.where(teacher_is_larger, delta + from_larger, from_larger)
    return u, torch.where(teacher_is_larger, -from_larger, delta - from_larger)


def _log_mixture(delta: torch.Tensor, share: float, log_share: float, log_rest: float) -> torch.Tensor:
    """`log((1 - share) + share e^delta)` for any share between 0 and 1; `log_rest` is `log(1 - share)`."""
    excess = torch.expm1(delta.clamp(max=_LARGE_DELTA)).mul_(share)
    # By log1p, which keeps the digits of a small result, but where 1 + excess would cancel or e^delta overflow.
    rest = torch.full((), log_rest, dtype=delta.dtype, device=delta.device)
    direct = torch.logaddexp(delta + log_share, rest)
    return torch.where((delta > _LARGE_DELTA) | (excess < -0.5), direct, excess.log1p_())


def _cap_gradient(logits: torch.Tensor, transform: LogitTransform) -> torch.Tensor | None:
    if transform.tanh_scale is None:
        return None
    return 1.0 - (logits / transform.tanh_scale).square_()


def _row_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vecdot(a, b)
