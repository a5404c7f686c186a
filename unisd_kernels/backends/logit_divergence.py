"""A divergence from logits that products have made: for the PyTorch and the C++ backend.

The logits of a chunk come from two products (or one, over the stacked rows of both views); statistics and gradients are
then taken of blocks of complete rows, in place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from unisd_kernels.backends.base import DivergenceRows, LogitBackend, LogitPair, NeedsGrad, ShardRows, WholeRows
from unisd_kernels.backends.buffers import most_rows, row_buffer, row_stride
from unisd_kernels.backends.projection import Projection


class LogitDivergence:
    """Walk over logits that a `LogitBackend` makes (`base.Divergence`)."""

    def __init__(
        self,
        backend: LogitBackend,
        student: Projection,
        teacher: Projection,
        beta: float,
        workspace_bytes: int,
        needs_grad: NeedsGrad,
        unit_weights: bool,
    ) -> None:
        self._backend, self._student, self._teacher, self._beta = backend, student, teacher, beta
        columns, device = student.num_columns, student.hidden.device
        row_bytes = 2 * row_stride(student.sizing_columns, backend.row_padding) * student.dtype.itemsize
        most = most_rows(workspace_bytes, row_bytes, student.sizing_columns)
        self.chunk_rows = backend.chunk_rows(student.hidden.shape[0], most, needs_grad.weight)
        # Slices of a vocabulary exchange their statistics once a block: all rows of the chunk.
        self.block_rows = backend.block_rows(columns, device) if student.shard is None else None
        # The student's rows of a chunk, then the teacher's.
        self._buffer = row_buffer(2 * self.chunk_rows, columns, backend.row_padding, student.dtype, device)
        self._narrow = backend.multiplies_narrow(student)
        self._with_gradient = backend.joins_gradient and needs_grad.any and unit_weights
        self._takes_delta = backend.takes_delta and student.can_project_delta(teacher)

    def logits(self, rows: slice) -> LogitPair:
        count = rows.stop - rows.start
        student, teacher, backend = self._student, self._teacher, self._backend
        student_tile, teacher_tile = self._buffer[:count], self._buffer[count : 2 * count]
        if not self._takes_delta:
            backend.logits(student, rows, student_tile)
            backend.logits(teacher, rows, teacher_tile)
            return LogitPair(student_tile, teacher_tile, None)
        hidden, is_delta = teacher.delta_rows(student, rows, narrow=self._narrow)
        if student.bias is None:
            # One walk through the weight for both.
            both = student.of_rows(torch.cat((student.hidden[rows].to(hidden.dtype), hidden)))
            backend.logits(both, slice(0, 2 * count), self._buffer[: 2 * count])
        else:
            backend.logits(student, rows, student_tile)
            backend.logits(replace(student.of_rows(hidden), bias=None), slice(0, count), teacher_tile)
            # The bias cancels in a difference.
            whole = is_delta.logical_not().nonzero().squeeze(-1)
            bias = student.bias.to(student.dtype) * student.transform.product_scale
            for row in whole.tolist():
                teacher_tile[row].add_(bias)
        return LogitPair(student_tile, teacher_tile, is_delta)

    def forward(
        self, chunk: LogitPair, rows: slice, local: slice, target_ids: torch.Tensor | None, want_entropy: bool
    ) -> tuple[DivergenceRows, Any]:
        return self._backend.divergence_of_logits(
            chunk.of_rows(local),
            self._student.transform,
            self._teacher.transform,
            target_ids,
            self._beta,
            want_entropy,
            self._with_gradient,
        )

    def backward(
        self,
        saved: Any,
        target_ids: torch.Tensor | None,
        weight: torch.Tensor | None,
        logprob_weight: torch.Tensor | None,
    ) -> None:
        if not self._with_gradient:
            self._backend.divergence_of_logits_backward(saved, target_ids, weight, logprob_weight)

    def gradient(self, count: int) -> torch.Tensor:
        return self._buffer[:count]

    def shard_forward(
        self, chunk: LogitPair, rows: slice, local: slice, target_ids: torch.Tensor | None, want_entropy: bool
    ) -> tuple[ShardRows, Any]:
        return self._backend.divergence_of_shard(
            chunk.of_rows(local),
            self._student.transform,
            self._teacher.transform,
            target_ids,
            self._beta,
            want_entropy,
        )

    def shard_mixture(self, saved: Any, whole: WholeRows) -> torch.Tensor:
        return self._backend.mixture_of_shard(saved, whole)

    def shard_backward(
        self,
        saved: Any,
        whole: WholeRows,
        target_ids: torch.Tensor | None,
        weight: torch.Tensor | None,
        logprob_weight: torch.Tensor | None,
    ) -> None:
        self._backend.divergence_of_shard_backward(saved, whole, target_ids, weight, logprob_weight)
