"""The walk over student and teacher that the PyTorch and the C++ backend share: logits of a chunk by their products,
then statistics and gradients of blocks of complete rows, in place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from unisd_kernels.backends.base import DivergenceRows, LogitBackend, NeedsGrad
from unisd_kernels.backends.buffers import most_rows, row_buffer, row_stride
from unisd_kernels.backends.projection import Projection


class TilePairWalk:
    """See `unisd_kernels.backends.base.PairWalk`."""

    def __init__(
        self,
        backend: LogitBackend,
        student: Projection,
        teacher: Projection,
        beta: float,
        workspace_bytes: int,
        needs_grad: NeedsGrad,
    ) -> None:
        self._backend, self._student, self._teacher, self._beta = backend, student, teacher, beta
        columns, device = student.num_columns, student.hidden.device
        row_bytes = 2 * row_stride(columns, backend.row_padding) * student.dtype.itemsize
        most = most_rows(workspace_bytes, row_bytes, columns)
        self.chunk_rows = backend.chunk_rows(student.hidden.shape[0], most, needs_grad.weight)
        self.block_rows = backend.block_rows(columns, device)
        self._buffer = row_buffer(2 * self.chunk_rows, columns, backend.row_padding, student.dtype, device)
        self._as_difference = backend.takes_difference and student.logits_differ_linearly(teacher)
        self._is_difference: torch.Tensor | None = None
        self._state: Any = None

    def begin(self, rows: slice) -> None:
        count = rows.stop - rows.start
        student, teacher, backend = self._student, self._teacher, self._backend
        self._student_tile, self._teacher_tile = self._buffer[:count], self._buffer[count : 2 * count]
        if not self._as_difference:
            backend.logits(student, rows, self._student_tile)
            backend.logits(teacher, rows, self._teacher_tile)
            return
        hidden, self._is_difference = teacher.minus(student, rows)
        if student.bias is None:
            # One walk through the weight for both.
            both = student.of_rows(torch.cat((student.hidden[rows].to(student.dtype), hidden)))
            backend.logits(both, slice(0, 2 * count), self._buffer[: 2 * count])
        else:
            backend.logits(student, rows, self._student_tile)
            backend.logits(replace(student.of_rows(hidden), bias=None), slice(0, count), self._teacher_tile)
            # The bias cancels in a difference.
            whole = self._is_difference.logical_not().nonzero().squeeze(-1)
            bias = student.bias.to(student.dtype) * student.transform.product_scale
            for row in whole.tolist():
                self._teacher_tile[row].add_(bias)

    def statistics(
        self, rows: slice, local: slice, target_ids: torch.Tensor | None, want_entropy: bool
    ) -> DivergenceRows:
        statistics, self._state = self._backend.divergence(
            self._student_tile[local],
            self._teacher_tile[local],
            self._student.transform,
            self._teacher.transform,
            target_ids,
            self._beta,
            want_entropy,
            None if self._is_difference is None else self._is_difference[local],
        )
        return statistics

    def gradient(
        self,
        local: slice,
        target_ids: torch.Tensor | None,
        weight: torch.Tensor | None,
        logprob_weight: torch.Tensor | None,
    ) -> None:
        self._backend.divergence_gradient(self._student_tile[local], self._state, target_ids, weight, logprob_weight)

    def gradient_tile(self, count: int) -> torch.Tensor:
        return self._student_tile[:count]
