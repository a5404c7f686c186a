"""Loops over chunks of rows with a backend's operations. Nothing of size [N, V] is ever held.

Statistics that do not need a whole row at once (`score`: log-sum-exp, target log-probability, entropy) go over tiles of
the vocabulary with an online log-sum-exp: one matrix product. A divergence, and gradients of scores, take a chunk of
complete rows at a time, so that the gradient with respect to the logits can be formed while they exist: student and
teacher logits and the gradient's product back to the hidden state are three products, four with a trainable head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch

from unisd_kernels.backends.base import (
    Backend,
    DivergenceRows,
    NeedsGrad,
    RunningScores,
    ScoreGrads,
    Scores,
    ShardDivergence,
)
from unisd_kernels.backends.buffers import advise_huge_pages, most_rows, row_buffer, row_stride, rows_of, spans
from unisd_kernels.backends.hidden_sum import HiddenSum
from unisd_kernels.backends.projection import Projection
from unisd_kernels.backends.shards import Backward, shard_forward, whole_scores

# Rows that are scored at a time: their statistics by tiles of the vocabulary stay small.
SCORE_ROWS = 2048


class Gradients(NamedTuple):
    """Gradients of a projection in the accumulator's dtype: [N, H], [V, H] and [V]; None where not asked for."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def scaled(
        self,
        scale: torch.Tensor | None,
        hidden_dtype: torch.dtype,
        weight_dtype: torch.dtype,
        backend: Backend | None = None,
        in_place: bool = False,
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients for a backward to return: times a 0-dim scale, in the dtypes of what they are the gradients of.

        `backend`: whose kernel multiplies the large ones; None in a graph that a compiler makes. `in_place`: nobody
        needs these any more, so what has the dtype already is scaled where it lies (a weight's gradient is as large as
        the weight).
        """

        def finish(gradient: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
            if gradient is None:
                return None
            if scale is None:
                return gradient.to(dtype)
            if in_place and gradient.dtype == dtype:
                return gradient.mul_(scale)
            if backend is not None and gradient.dim() == 2:
                return backend.scale_rows(gradient, scale.expand(gradient.shape[0]), dtype)
            # Straight into the narrow dtype: a float32 product of a weight's gradient is large.
            return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))

        return finish(self.hidden, hidden_dtype), finish(self.weight, weight_dtype), finish(self.bias, weight_dtype)


def allocate(needs_grad: NeedsGrad, projection: Projection, written: bool) -> Gradients:
    """Gradients to write into. `written`: every element of hidden state's and weight's will be, and needs no zero (but
    of a vocabulary's slice without a column)."""
    written = written and projection.num_columns > 0

    def make(like: torch.Tensor | None, written: bool) -> torch.Tensor:
        assert like is not None
        function = torch.empty if written else torch.zeros
        made = function(like.shape, dtype=projection.dtype, device=like.device)
        advise_huge_pages(made)
        return made

    return Gradients(
        make(projection.hidden, written) if needs_grad.hidden else None,
        make(projection.weight, written) if needs_grad.weight else None,
        make(projection.bias, False) if needs_grad.bias else None,
    )


# From the rows of a block and their statistics to (weight of D, weight of the student's log-probability), each [rows]
# or None. Called once a block, while its logits exist.
RowWeights = Callable[[slice, DivergenceRows], tuple[torch.Tensor | None, torch.Tensor | None]]


def unit_row_weights(rows: slice, statistics: DivergenceRows) -> tuple[None, None]:
    """Weights of the plain per-token gradient dD_n / dh_n, whose rows are scaled afterwards."""
    return None, None


def default_workspace_bytes(device: torch.device, weight_gradient: bool = False) -> int:
    """100 MiB on a CPU; 400 MiB on an accelerator, 800 MiB with a weight gradient there (`docs/design.md`).

    Each chunk reads and writes all of the weight's gradient, which is several times as large anyway.
    """
    if device.type == "cpu":
        return 100 << 20
    return (800 << 20) if weight_gradient else (400 << 20)


def _exactly(device: torch.device) -> AbstractContextManager[object]:
    """Neither recorded by autograd nor rounded by autocast, in the forward and in the backward alike."""
    if not torch.is_autocast_enabled(device.type):
        # What takes the host a tenth of the time; and where it is so already, nothing.
        return torch.no_grad() if torch.is_grad_enabled() else nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    stack.enter_context(torch.autocast(device.type, enabled=False))
    return stack


@dataclass(frozen=True)
class Engine:
    """A backend and the bytes of logits that may be held at a time."""

    backend: Backend
    workspace_bytes: int

    @classmethod
    def of(cls, backend: Backend, workspace_bytes: int | None, device: torch.device, weight_gradient: bool) -> Engine:
        """Engine with the default workspace where none is given."""
        return cls(backend, workspace_bytes or default_workspace_bytes(device, weight_gradient))

    def score(self, projection: Projection, target_ids: torch.Tensor, want_entropy: bool = False) -> Scores:
        """Log-probability of the target ids [N], log-sum-exp and (if wanted) entropy of each row, by an online
        log-sum-exp: one product."""
        return self.score_views([(projection, target_ids)], want_entropy)[0]

    def score_views(self, views: Sequence[tuple[Projection, torch.Tensor]], want_entropy: bool = False) -> list[Scores]:
        """`score` of several views and their target ids. Where the heads are slices of a vocabulary, which is then the
        same for all, the ranks exchange the statistics of all views at once."""
        if not views or (shard := views[0][0].shard) is None:
            return [self._score(*view, want_entropy) for view in views]
        ids = [shard.local_ids(target_ids) for _, target_ids in views]
        with _exactly(views[0][0].hidden.device):
            parts = [
                self._score(projection, local.clamp(min=0), want_entropy)
                for (projection, _), local in zip(views, ids, strict=True)
            ]
            return whole_scores(shard, parts, ids)

    def _score(self, projection: Projection, target_ids: torch.Tensor, want_entropy: bool) -> Scores:
        """Scores over the columns that are here."""
        num_rows, device, dtype = projection.hidden.shape[0], projection.hidden.device, projection.dtype
        with _exactly(device):
            logsumexp, target_logits = (torch.empty(num_rows, dtype=dtype, device=device) for _ in range(2))
            entropy = torch.empty(num_rows, dtype=dtype, device=device) if want_entropy else None
            if projection.num_columns == 0:
                zero = None if entropy is None else entropy.zero_()
                return Scores(target_logits.zero_(), logsumexp.fill_(-torch.inf), zero)
            for rows in spans(num_rows, SCORE_ROWS):
                part = None if entropy is None else rows_of(entropy, rows)
                running = RunningScores(rows_of(logsumexp, rows), rows_of(target_logits, rows), part)
                self.backend.score(projection, rows, rows_of(target_ids, rows), running, self.workspace_bytes)
            return Scores(target_logits - logsumexp, logsumexp, entropy)

    def score_with_gradient(self, projection: Projection, target_ids: torch.Tensor) -> tuple[Scores, torch.Tensor]:
        """Scores without entropy, and `d logsumexp_n / dh_n` [N, H]: two products.

        The gradient of the log-probability is that of the target's logit, a row of the weight, less this one: so any
        upstream weights on either statistic are row scalings afterwards. Of a slice of a vocabulary the gradient is
        this rank's part of it: the ranks' are still to be added up.
        """
        num_rows, device, dtype = projection.hidden.shape[0], projection.hidden.device, projection.dtype
        with _exactly(device):
            logsumexp = torch.zeros(num_rows, dtype=dtype, device=device)
            target_logits = torch.zeros(num_rows, dtype=dtype, device=device)
            gradient = torch.zeros(projection.hidden.shape, dtype=dtype, device=device)
            shard = projection.shard
            local_ids = target_ids if shard is None else shard.local_ids(target_ids)
            target_ids = local_ids.clamp(min=0)
            if projection.num_columns == 0:
                logsumexp.fill_(-torch.inf)
            for chunk in self._logits(projection, weight_gradient=False):
                for block in chunk.blocks:
                    part = self.backend.softmax(
                        chunk.logits[block.local],
                        chunk.gradient[block.local],
                        projection.transform,
                        target_ids[block.rows],
                    )
                    logsumexp[block.rows] = part.logsumexp
                    target_logits[block.rows] = part.target_logits
                self.backend.hidden_gradient(projection, chunk.gradient, gradient[chunk.rows])
            scores = Scores(target_logits - logsumexp, logsumexp, None)
            if shard is not None and num_rows:
                (scores,) = whole_scores(shard, [scores], [local_ids])
                if projection.num_columns:
                    gradient.mul_((logsumexp - scores.logsumexp).exp_().unsqueeze(-1))
            return scores, gradient

    def score_gradients(
        self,
        projection: Projection,
        target_ids: torch.Tensor,
        scores: Scores,
        grads: ScoreGrads,
        needs_grad: NeedsGrad,
    ) -> Gradients:
        """Gradients of `sum_n` upstream times statistic over all rows, from recomputed logits: a product, and one for
        each gradient. `target_ids` is [N]."""
        with _exactly(projection.hidden.device):
            gradients = allocate(needs_grad, projection, written=projection.hidden.shape[0] > 0)
            if projection.shard is not None:
                local_ids = projection.shard.local_ids(target_ids)
                grads, target_ids = _of_slice(grads, local_ids >= 0), local_ids.clamp(min=0)
            total = HiddenSum(projection.shard, gradients.hidden)
            for chunk in self._logits(projection, needs_grad.weight):
                for block in chunk.blocks:
                    self.backend.score_backward(
                        chunk.logits[block.local],
                        chunk.gradient[block.local],
                        projection.transform,
                        target_ids[block.rows],
                        scores.of_rows(block.rows),
                        grads.of_rows(block.rows),
                    )
                self._accumulate(projection, chunk.gradient, chunk.rows, gradients, total)
            total.finish()
            return gradients

    def divergence(
        self,
        student: Projection,
        teacher: Projection,
        target_ids: torch.Tensor | None,
        beta: float,
        needs_grad: NeedsGrad = NeedsGrad(),
        row_weights: RowWeights = unit_row_weights,
        want_entropy: bool = False,
    ) -> tuple[DivergenceRows, Gradients]:
        """Divergence of each row and, in the same walk, the gradients of `sum_n w_n D_n + c_n logp_n(y_n)`.

        Two products, one more for the hidden gradient, one more for the weight gradient. `target_ids` is [N], or None
        where no log-probability is asked for. Of a slice of a vocabulary the ranks exchange the statistics of each
        block (`shards.py`), and add up the hidden gradient of rows while the next are made (`hidden_sum.py`).
        """
        num_rows, device = student.hidden.shape[0], student.hidden.device
        names = ["divergence"]
        if target_ids is not None:
            names += ["student_logprobs", "teacher_logprobs"]
        if want_entropy:
            names += ["student_entropy", "teacher_entropy"]
        with _exactly(device):
            gradients = allocate(needs_grad, student, written=num_rows > 0)
            total = HiddenSum(student.shard, gradients.hidden)
            results = {name: torch.zeros(num_rows, dtype=student.dtype, device=device) for name in names}
            if num_rows:
                unit_weights = row_weights is unit_row_weights
                pair = self.backend.divergence(student, teacher, beta, self.workspace_bytes, needs_grad, unit_weights)
                for rows in spans(num_rows, pair.chunk_rows):
                    chunk = pair.logits(rows) if student.num_columns else None
                    for block in _blocks(rows, pair.block_rows):
                        targets = None if target_ids is None else target_ids[block.rows]
                        if student.shard is None:
                            statistics, saved = pair.forward(chunk, *block, targets, want_entropy)
                            backward: Backward = functools.partial(pair.backward, saved, targets)
                        else:
                            slices = cast("ShardDivergence", pair)
                            statistics, backward = shard_forward(
                                student, slices, beta, chunk, *block, targets, want_entropy
                            )
                        for name in names:
                            results[name][block.rows] = getattr(statistics, name)
                        if needs_grad.any:
                            backward(*row_weights(block.rows, statistics))
                    if needs_grad.any and student.num_columns:
                        self._accumulate(student, pair.gradient(rows.stop - rows.start), rows, gradients, total)
                    # Of a slice without a column too: ranks send in one order.
                    total.written(rows.stop)
            total.finish()
        statistics = DivergenceRows(**{name: results.get(name) for name in DivergenceRows._fields})  # type: ignore[arg-type]
        return statistics, gradients

    def _logits(self, projection: Projection, weight_gradient: bool) -> Iterator[_Chunk]:
        """Chunks of complete rows with their logits made, in buffers that the next chunk overwrites."""
        num_rows, columns = projection.hidden.shape[0], projection.num_columns
        if columns == 0:
            return
        padding, device = self.backend.row_padding, projection.hidden.device
        dtype, gradient_dtype = projection.dtype, self.backend.gradient_dtype(projection)
        in_place = gradient_dtype == dtype
        element_bytes = dtype.itemsize + (0 if in_place else gradient_dtype.itemsize)
        most = most_rows(self.workspace_bytes, row_stride(columns, padding) * element_bytes, columns)
        chunk_rows = max(1, self.backend.chunk_rows(num_rows, most, weight_gradient))
        logits = row_buffer(chunk_rows, columns, padding, dtype, device)
        gradient = logits if in_place else row_buffer(chunk_rows, columns, padding, gradient_dtype, device)
        block_rows = self.backend.block_rows(columns, device)
        for rows in spans(num_rows, chunk_rows):
            count = rows.stop - rows.start
            self.backend.logits(projection, rows, logits[:count])
            yield _Chunk(rows, logits[:count], gradient[:count], tuple(_blocks(rows, block_rows)))

    def _accumulate(
        self, projection: Projection, tile: torch.Tensor, rows: slice, gradients: Gradients, total: HiddenSum
    ) -> None:
        """Multiply a chunk's gradient tile [rows, V] into the gradients; the hidden one, which `total` sends, first."""
        if gradients.hidden is not None:
            for piece in total.pieces(rows.stop - rows.start):
                begin, end = rows.start + piece.start, rows.start + piece.stop
                self.backend.hidden_gradient(projection, rows_of(tile, piece), gradients.hidden[begin:end])
                total.written(end)
        if gradients.weight is not None:
            self.backend.add_weight_gradient(projection, tile, rows, gradients.weight, rows.start == 0)
        if gradients.bias is not None:
            projection.add_bias_gradient(tile, gradients.bias)


def _of_slice(grads: ScoreGrads, owned: torch.Tensor) -> ScoreGrads:
    """The same gradients where another rank has some of the targets: their columns are not here, but a log-probability
    is also less the log-sum-exp."""
    if grads.logprobs is None:
        return grads
    elsewhere = torch.where(owned, 0.0, grads.logprobs)
    on_logsumexp = -elsewhere if grads.logsumexp is None else grads.logsumexp - elsewhere
    return ScoreGrads(grads.logprobs - elsewhere, on_logsumexp, grads.entropy)


class _Block(NamedTuple):
    """Rows of all, and the same rows in their chunk."""

    rows: slice
    local: slice


class _Chunk(NamedTuple):
    rows: slice
    logits: torch.Tensor  # [rows, V]
    gradient: torch.Tensor  # [rows, V]; the same memory, unless the backend writes gradients in a dtype of their own
    blocks: tuple[_Block, ...]


def _blocks(rows: slice, step: int | None) -> Iterator[_Block]:
    length = rows.stop - rows.start
    for local in spans(length, step or length):
        yield _Block(slice(rows.start + local.start, rows.start + local.stop), local)
