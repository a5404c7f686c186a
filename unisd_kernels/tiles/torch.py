"""The PyTorch filling: any device, any of torch's floating types, no compiler."""

from __future__ import annotations

from typing import NamedTuple

import torch

from unisd_kernels.tiles.base import DivergenceRows, LogitTransform, PairWalk, RunningScores, SoftmaxRows, Wanted
from unisd_kernels.tiles.buffers import equal_chunks
from unisd_kernels.tiles.pair_walk import TilePairWalk
from unisd_kernels.tiles.projection import Projection

# Elementwise passes on a CPU run over blocks of this many bytes, so that a block is still in the cache at the next
# pass. Much smaller ones would pay for starting operations, larger ones would fall out of the cache.
_CPU_BLOCK_BYTES = 2 << 20
# Elsewhere blocks only bound the temporaries of the elementwise operations.
_DEVICE_BLOCK_BYTES = 64 << 20

# Scoring tiles: wide enough for an efficient product, small enough to stay near the cache.
_CPU_SCORE_TILE_BYTES = 32 << 20

# e^60 = 1e26 dwarfs any (1 - beta) / beta that is not absurd, and is far from float32's overflow at e^88.
_LARGE_DELTA = 60.0


class DivergenceState(NamedTuple):
    """What `divergence_gradient` needs besides the tile."""

    student_probs: torch.Tensor
    factor: torch.Tensor | None  # the gradient is student_probs * factor; None: it stands in the tile (beta = 0)
    cap_gradient: torch.Tensor | None  # 1 - tanh^2, with a soft cap


class TileLogSumExp(NamedTuple):
    """Per row of a [rows, columns] tile."""

    logsumexp: torch.Tensor
    mean_logit: torch.Tensor | None  # sum_j softmax_j z_j within the tile; for the entropy


class TorchTiles:
    """See `unisd_kernels.tiles.base.Tiles`."""

    name = "torch"
    stacks_views = False
    takes_difference = False
    row_padding = 0

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
        mean = None if running.entropy is None else torch.zeros_like(running.entropy)
        for start in range(0, num_columns, step):
            width = min(step, num_columns - start)
            tile = buffer[: num_rows * width].view(num_rows, width)
            projection.logits(rows, tile, start, start + width)
            block = self.block_rows(width, device)
            for low in range(0, num_rows, block):
                part = slice(low, low + block)
                mean_part = None if mean is None else mean[part]
                self._merge(tile[part], projection.transform, running.logsumexp[part], mean_part)
            index = target_ids - start
            inside = (index >= 0) & (index < width)
            found = tile.gather(-1, index.clamp(0, width - 1).unsqueeze(-1)).squeeze(-1)
            running.target_logits.copy_(torch.where(inside, found, running.target_logits))

        if running.entropy is not None:
            assert mean is not None
            torch.sub(running.logsumexp, mean, out=running.entropy)

    def _merge(
        self, tile: torch.Tensor, transform: LogitTransform, logsumexp: torch.Tensor, mean: torch.Tensor | None
    ) -> None:
        part = self._log_sum_exp(tile, transform, mean is not None)
        before = logsumexp.clone()
        after = torch.logaddexp(before, part.logsumexp)
        if mean is not None:
            assert part.mean_logit is not None
            mean.mul_((before - after).exp()).add_(part.mean_logit * (part.logsumexp - after).exp())
        logsumexp.copy_(after)

    def _log_sum_exp(self, tile: torch.Tensor, transform: LogitTransform, want_mean: bool) -> TileLogSumExp:
        _finish_logits(tile, transform)
        highest = tile.amax(-1, keepdim=True)
        shifted = tile - highest
        mean = None
        if want_mean:
            exponentials = shifted.exp()
            total = exponentials.sum(-1)
            mean = _row_dot(exponentials, shifted) / total + highest.squeeze(-1)
        else:
            total = shifted.exp_().sum(-1)
        return TileLogSumExp(highest.squeeze(-1) + total.log(), mean)

    def scale_rows(self, rows: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return (rows * scale.unsqueeze(-1)).to(dtype)

    def pair_walk(
        self, student: Projection, teacher: Projection, beta: float, workspace_bytes: int, wanted: Wanted
    ) -> PairWalk:
        return TilePairWalk(self, student, teacher, beta, workspace_bytes, wanted)

    def softmax(
        self, tile: torch.Tensor, gradient: torch.Tensor, transform: LogitTransform, target_ids: torch.Tensor
    ) -> SoftmaxRows:
        logsumexp = self._log_sum_exp(tile, transform, want_mean=False).logsumexp
        target_logits = tile.gather(-1, target_ids.unsqueeze(-1)).squeeze(-1)
        cap_gradient = _cap_gradient(tile, transform)
        tile.sub_(logsumexp.unsqueeze(-1)).exp_()
        if cap_gradient is not None:
            tile.mul_(cap_gradient)
        return SoftmaxRows(logsumexp, target_logits)

    def logprob_gradient(
        self,
        tile: torch.Tensor,
        gradient: torch.Tensor,
        transform: LogitTransform,
        logsumexp: torch.Tensor,
        target_ids: torch.Tensor,
        logprob_weight: torch.Tensor | None,
        logsumexp_weight: torch.Tensor | None,
        entropy: torch.Tensor | None,
        entropy_weight: torch.Tensor | None,
    ) -> None:
        _finish_logits(tile, transform)
        cap_gradient = _cap_gradient(tile, transform)
        # d logp_y / dz = 1[y] - p,   d lse / dz = p,   d entropy / dz = -p (log p + entropy)
        probs_weight = torch.zeros_like(logsumexp)
        if logprob_weight is not None:
            probs_weight = probs_weight - logprob_weight
        if logsumexp_weight is not None:
            probs_weight = probs_weight + logsumexp_weight
        tile.sub_(logsumexp.unsqueeze(-1))
        if entropy_weight is not None:
            assert entropy is not None
            probs = tile.exp()
            tile.add_(entropy.unsqueeze(-1)).mul_(entropy_weight.unsqueeze(-1)).neg_()
            tile.add_(probs_weight.unsqueeze(-1)).mul_(probs)
        else:
            tile.exp_().mul_(probs_weight.unsqueeze(-1))
        if logprob_weight is not None:
            tile.scatter_add_(-1, target_ids.unsqueeze(-1), logprob_weight.to(tile.dtype).unsqueeze(-1))
        if cap_gradient is not None:
            tile.mul_(cap_gradient)

    def divergence(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        student_transform: LogitTransform,
        teacher_transform: LogitTransform,
        target_ids: torch.Tensor | None,
        beta: float,
        want_entropy: bool,
        is_difference: torch.Tensor | None = None,
    ) -> tuple[DivergenceRows, DivergenceState]:
        assert is_difference is None
        _finish_logits(student, student_transform)
        _finish_logits(teacher, teacher_transform)
        cap_gradient = _cap_gradient(student, student_transform)
        # log_softmax reads and writes row by row, so writing over its input is safe.
        torch.log_softmax(student, -1, out=student)
        torch.log_softmax(teacher, -1, out=teacher)
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
        factor = None
        if beta == 0.0:
            divergence = _row_dot(teacher_probs, delta) + student.sum(-1)
        elif beta == 1.0:
            divergence = -(_row_dot(student_probs, delta) + student.sum(-1))
            factor = delta.add_(divergence.unsqueeze(-1)).neg_()
        else:
            # u = log(m / p_s) = log((1 - beta) + beta e^delta), so log p_s - log m = -u and log p_t - log m =
            # delta - u. Finite for every finite delta, so nothing is NaN where both probabilities underflow; beyond
            # the bound u is delta + log(beta) to the last bit.
            bounded = delta.clamp(max=_LARGE_DELTA)
            u = torch.expm1(bounded).mul_(beta).log1p_().add_(torch.sub(delta, bounded, out=bounded))
            kl_teacher = _row_dot(teacher_probs, delta.sub_(u))
            kl_student = -_row_dot(student_probs, u)
            divergence = beta * kl_teacher + (1.0 - beta) * kl_student
            factor = u.add_(kl_student.unsqueeze(-1)).mul_(beta - 1.0)
        # A divergence is not negative; below zero there is only rounding. clamp keeps NaN.
        rows = DivergenceRows(
            divergence.clamp(min=0.0), student_logprobs, teacher_logprobs, student_entropy, teacher_entropy
        )
        return rows, DivergenceState(student_probs, factor, cap_gradient)

    def divergence_gradient(
        self,
        student: torch.Tensor,
        state: DivergenceState,
        target_ids: torch.Tensor | None,
        weight: torch.Tensor | None,
        logprob_weight: torch.Tensor | None,
    ) -> None:
        if state.factor is not None:
            torch.mul(state.student_probs, state.factor, out=student)
        if weight is not None:
            student.mul_(weight.unsqueeze(-1))
        if logprob_weight is not None:
            student.addcmul_(state.student_probs, logprob_weight.unsqueeze(-1), value=-1.0)
        if logprob_weight is not None:
            assert target_ids is not None
            student.scatter_add_(-1, target_ids.unsqueeze(-1), logprob_weight.unsqueeze(-1))
        if state.cap_gradient is not None:
            student.mul_(state.cap_gradient)


def _finish_logits(tile: torch.Tensor, transform: LogitTransform) -> None:
    if transform.tanh_scale is not None:
        tile.tanh_().mul_(transform.tanh_scale)


def _cap_gradient(logits: torch.Tensor, transform: LogitTransform) -> torch.Tensor | None:
    if transform.tanh_scale is None:
        return None
    return 1.0 - (logits / transform.tanh_scale).square_()


def _row_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vecdot(a, b)
