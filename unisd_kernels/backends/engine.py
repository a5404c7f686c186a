"""The loops over row chunks and vocabulary tiles. Nothing of size [N, V] is ever held.

Two walks:

- `score`: statistics that do not need a whole row at once (log-sum-exp, target log-probability, entropy) go over
  vocabulary tiles with an online log-sum-exp. One matrix product.
- `divergence` and `logprob_gradients`: a chunk of complete rows at a time, so that the gradient with respect to the
  logits can be formed while they exist. Student and teacher logits plus the gradient's product back to the hidden
  state: three matrix products, four with a trainable head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple, ParamSpec, TypeVar

import torch

from unisd_kernels.backends.base import Backend, DivergenceRows, NeedsGrad, RunningScores
from unisd_kernels.backends.buffers import TILE_ROWS, most_rows, row_buffer, row_stride
from unisd_kernels.backends.projection import Projection

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Rows that are scored at a time: their statistics by tiles of the vocabulary stay small.
_SCORE_ROWS = 2048


class Scores(NamedTuple):
    """[N] statistics of `score`."""

    logprobs: torch.Tensor
    logsumexp: torch.Tensor
    entropy: torch.Tensor | None


class Gradients(NamedTuple):
    """Of a student projection, in the accumulator's dtype; None where not asked for."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def scaled(
        self, scale: torch.Tensor | None, hidden_dtype: torch.dtype, weight_dtype: torch.dtype
    ) -> tuple[torch.Tensor | None, ...]:
        """In the dtypes of what they are the gradients of, times a 0-dim scale; for the backward to return."""

        def finish(gradient: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
            if gradient is None:
                return None
            if scale is None:
                return gradient.to(dtype)
            # Straight into the narrow dtype: a float32 product of a weight's gradient is large.
            return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))

        return finish(self.hidden, hidden_dtype), finish(self.weight, weight_dtype), finish(self.bias, weight_dtype)


def allocate(needs_grad: NeedsGrad, projection: Projection, written: bool) -> Gradients:
    """For the needs_grad gradients; `written`: of hidden state and weight every element will be, and needs no zero."""

    def make(like: torch.Tensor | None, written: bool) -> torch.Tensor:
        assert like is not None
        function = torch.empty if written else torch.zeros
        return function(like.shape, dtype=projection.dtype, device=like.device)

    return Gradients(
        make(projection.hidden, written) if needs_grad.hidden else None,
        make(projection.weight, written) if needs_grad.weight else None,
        make(projection.bias, False) if needs_grad.bias else None,
    )


def needs_grad_of(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> NeedsGrad:
    """What autograd will ask for. Taken outside the autograd function: inside it `needs_input_grad` is also true
    under `no_grad`."""
    if not torch.is_grad_enabled():
        return NeedsGrad()
    return NeedsGrad(hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)


def _exactly(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Neither recorded by autograd nor rounded by autocast, in the forward and in the backward alike."""

    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        projection = args[0]
        assert isinstance(projection, Projection)
        with torch.no_grad(), torch.autocast(projection.hidden.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


# From the rows of a block and their statistics to (weight of D, weight of the student's log-probability), each [rows]
# or None. Called once a block, while its logits exist.
RowWeights = Callable[[slice, DivergenceRows], tuple[torch.Tensor | None, torch.Tensor | None]]


def unit_row_weights(rows: slice, statistics: DivergenceRows) -> tuple[None, None]:
    """The plain per-token gradient dD_n / dh_n; weights are applied to its rows afterwards."""
    return None, None


def default_workspace_bytes(device: torch.device, weight_gradient: bool = False) -> int:
    """100 MiB on a CPU; 400 MiB on an accelerator, 800 MiB with a weight gradient there (`docs/design.md`).

    Each chunk reads and writes all of the weight's gradient, which is several times as large anyway.
    """
    if device.type == "cpu":
        return 100 << 20
    return (800 << 20) if weight_gradient else (400 << 20)


class _LogitBuffers(NamedTuple):
    """For chunks of one view's logits."""

    chunk_rows: int
    logits: torch.Tensor
    gradient: torch.Tensor  # the same one, unless the backend writes gradients in a dtype of their own

    @classmethod
    def of(cls, backend: Backend, projection: Projection, workspace_bytes: int, weight_gradient: bool) -> _LogitBuffers:
        columns, padding, device = projection.num_columns, backend.row_padding, projection.hidden.device
        dtype, gradient_dtype = projection.dtype, backend.gradient_dtype(projection)
        in_place = gradient_dtype == dtype
        element_bytes = dtype.itemsize + (0 if in_place else gradient_dtype.itemsize)
        most = most_rows(workspace_bytes, row_stride(columns, padding) * element_bytes, columns)
        rows = max(1, backend.chunk_rows(projection.hidden.shape[0], most, weight_gradient))
        logits = row_buffer(rows, columns, padding, dtype, device)
        gradient = logits if in_place else row_buffer(rows, columns, padding, gradient_dtype, device)
        return cls(rows, logits, gradient)


def _spans(total: int, step: int) -> Iterator[slice]:
    """Spans of at most `step`. Whole tiles are spread evenly: a last span of one tile would read the weight for it."""
    in_tiles = step > TILE_ROWS and step % TILE_ROWS == 0
    start = 0
    for left in range(-(-total // step), 0, -1):
        size = step
        if in_tiles:
            size = min(step, -(-(total - start) // (left * TILE_ROWS)) * TILE_ROWS)
        yield slice(start, min(start + size, total))
        start += size


def _blocks(rows: slice, step: int | None) -> Iterator[tuple[slice, slice]]:
    """Blocks of a chunk, as (rows of the whole, rows of the chunk)."""
    length = rows.stop - rows.start
    for local in _spans(length, step or length):
        yield slice(rows.start + local.start, rows.start + local.stop), local


@_exactly
def score(
    projection: Projection,
    target_ids: torch.Tensor,
    backend: Backend,
    workspace_bytes: int,
    want_entropy: bool = False,
) -> Scores:
    """Log-probability of the target, log-sum-exp and (if needs_grad) entropy of each row, by an online log-sum-exp."""
    num_rows, device, dtype = projection.hidden.shape[0], projection.hidden.device, projection.dtype
    logsumexp = torch.full((num_rows,), -torch.inf, dtype=dtype, device=device)
    target_logits = torch.zeros(num_rows, dtype=dtype, device=device)
    entropy = torch.zeros(num_rows, dtype=dtype, device=device) if want_entropy else None
    for rows in _spans(num_rows, _SCORE_ROWS):
        running = RunningScores(logsumexp[rows], target_logits[rows], None if entropy is None else entropy[rows])
        backend.score(projection, rows, target_ids[rows], running, workspace_bytes)
    return Scores(target_logits - logsumexp, logsumexp, entropy)


@_exactly
def score_with_gradient(
    projection: Projection, target_ids: torch.Tensor, backend: Backend, workspace_bytes: int
) -> tuple[Scores, torch.Tensor]:
    """Scores without entropy, and `d logsumexp_n / dh_n` [N, H] (two matrix products).

    The gradient of the log-probability is that of the target's logit, a row of the weight, less this one: so any
    upstream weights on either statistic are row scalings afterwards.
    """
    num_rows, device, dtype = projection.hidden.shape[0], projection.hidden.device, projection.dtype
    logsumexp = torch.zeros(num_rows, dtype=dtype, device=device)
    target_logits = torch.zeros(num_rows, dtype=dtype, device=device)
    gradient = torch.zeros(projection.hidden.shape, dtype=dtype, device=device)
    buffers = _LogitBuffers.of(backend, projection, workspace_bytes, weight_gradient=False)
    for rows in _spans(num_rows, buffers.chunk_rows):
        tile, tile_gradient = buffers.logits[: rows.stop - rows.start], buffers.gradient[: rows.stop - rows.start]
        backend.logits(projection, rows, tile)
        for block, local in _blocks(rows, backend.block_rows(projection.num_columns, device)):
            part = backend.softmax(tile[local], tile_gradient[local], projection.transform, target_ids[block])
            logsumexp[block] = part.logsumexp
            target_logits[block] = part.target_logits
        backend.hidden_gradient(projection, tile_gradient, gradient[rows])
    return Scores(target_logits - logsumexp, logsumexp, None), gradient


@_exactly
def logprob_gradients(
    projection: Projection,
    target_ids: torch.Tensor,
    scores: Scores,
    logprob_weight: torch.Tensor | None,
    logsumexp_weight: torch.Tensor | None,
    entropy_weight: torch.Tensor | None,
    needs_grad: NeedsGrad,
    backend: Backend,
    workspace_bytes: int,
) -> Gradients:
    """Gradient of `sum_n` weight times statistic over all rows, from recomputed logits (weights [N] or None)."""
    num_rows, device = projection.hidden.shape[0], projection.hidden.device
    gradients = allocate(needs_grad, projection, written=num_rows > 0)

    def part(values: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
        return None if values is None else values[rows]

    buffers = _LogitBuffers.of(backend, projection, workspace_bytes, needs_grad.weight)
    for rows in _spans(num_rows, buffers.chunk_rows):
        tile, tile_gradient = buffers.logits[: rows.stop - rows.start], buffers.gradient[: rows.stop - rows.start]
        backend.logits(projection, rows, tile)
        for block, local in _blocks(rows, backend.block_rows(projection.num_columns, device)):
            backend.logprob_gradient(
                tile[local],
                tile_gradient[local],
                projection.transform,
                scores.logsumexp[block],
                target_ids[block],
                part(logprob_weight, block),
                part(logsumexp_weight, block),
                part(scores.entropy, block),
                part(entropy_weight, block),
            )
        _accumulate(backend, projection, tile_gradient, rows, gradients)
    return gradients


class DivergencePass(NamedTuple):
    """The result of `divergence`: [N] statistics and the gradients that were asked for."""

    rows: DivergenceRows
    gradients: Gradients


@_exactly
def divergence(
    student: Projection,
    teacher: Projection,
    target_ids: torch.Tensor | None,
    beta: float,
    backend: Backend,
    workspace_bytes: int,
    needs_grad: NeedsGrad = NeedsGrad(),
    row_weights: RowWeights = unit_row_weights,
    want_entropy: bool = False,
) -> DivergencePass:
    """Divergence of each row and, in the same walk, the gradient of `sum_n w_n D_n + c_n logp_n(y_n)`.

    Matrix products: 2, plus 1 for the hidden gradient, plus 1 for the weight gradient.
    """
    num_rows = student.hidden.shape[0]
    device, dtype = student.hidden.device, student.dtype
    gradients = allocate(needs_grad, student, written=num_rows > 0)
    names = ["divergence"]
    if target_ids is not None:
        names += ["student_logprobs", "teacher_logprobs"]
    if want_entropy:
        names += ["student_entropy", "teacher_entropy"]
    results = {name: torch.zeros(num_rows, dtype=dtype, device=device) for name in names}

    if num_rows:
        walk = backend.pair_walk(student, teacher, beta, workspace_bytes, needs_grad)
        for rows in _spans(num_rows, walk.chunk_rows):
            walk.begin(rows)
            for block, local in _blocks(rows, walk.block_rows):
                targets = None if target_ids is None else target_ids[block]
                statistics = walk.statistics(block, local, targets, want_entropy)
                for name in names:
                    results[name][block] = getattr(statistics, name)
                if needs_grad.any:
                    walk.gradient(local, targets, *row_weights(block, statistics))
            if needs_grad.any:
                _accumulate(backend, student, walk.gradient_tile(rows.stop - rows.start), rows, gradients)
    return DivergencePass(
        DivergenceRows(**{name: results.get(name) for name in DivergenceRows._fields}),  # type: ignore[arg-type]
        gradients,
    )


def _accumulate(
    backend: Backend, projection: Projection, tile: torch.Tensor, rows: slice, gradients: Gradients
) -> None:
    if gradients.hidden is not None:
        backend.hidden_gradient(projection, tile, gradients.hidden[rows])
    if gradients.weight is not None:
        projection.add_weight_gradient(tile, rows, gradients.weight, first=rows.start == 0)
    if gradients.bias is not None:
        projection.add_bias_gradient(tile, gradients.bias)
