"""The walk over student and teacher that the PyTorch and the C++ filling share: logits of a chunk by their products,
then statistics and gradients of blocks of complete rows, in place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from unisd_kernels.tiles.base import DivergenceRows, TileFilling, Wanted
from unisd_kernels.tiles.buffers import most_rows, row_buffer, row_stride
from unisd_kernels.tiles.projection import Projection


class TilePairWalk:
    """See `unisd_kernels.tiles.base.PairWalk`."""

    def __init__(
        self,
        tiles: TileFilling,
        student: Projection,
        teacher: Projection,
        beta: float,
        workspace_bytes: int,
        wanted: Wanted,
    ) -> None:
        self._tiles, self._student, self._teacher, self._beta = tiles, student, teacher, beta
        columns, device = student.num_columns, student.hidden.device
        row_bytes = 2 * row_stride(columns, tiles.row_padding) * student.dtype.itemsize
        most = most_rows(workspace_bytes, row_bytes, columns)
        self.chunk_rows = tiles.chunk_rows(student.hidden.shape[0], most, wanted.weight)
        self.block_rows = tiles.block_rows(columns, device)
        self._buffer = row_buffer(2 * self.chunk_rows, columns, tiles.row_padding, student.dtype, device)
        self._as_difference = tiles.takes_difference and student.logits_differ_linearly(teacher)
        self._is_difference: torch.Tensor | None = None
        self._state: Any = None

    def begin(self, rows: slice) -> None:
        count = rows.stop - rows.start
        student, teacher, tiles = self._student, self._teacher, self._tiles
        self._student_tile, self._teacher_tile = self._buffer[:count], self._buffer[count : 2 * count]
        if not self._as_difference:
            tiles.logits(student, rows, self._student_tile)
            tiles.logits(teacher, rows, self._teacher_tile)
            return
        hidden, self._is_difference = teacher.minus(student, rows)
        if student.bias is None:
            # One walk through the weight for both.
            both = student.of_rows(torch.cat((student.hidden[rows].to(student.dtype), hidden)))
            tiles.logits(both, slice(0, 2 * count), self._buffer[: 2 * count])
        else:
            tiles.logits(student, rows, self._student_tile)
            tiles.logits(replace(student.of_rows(hidden), bias=None), slice(0, count), self._teacher_tile)
            # The bias cancels in a difference.
            whole = self._is_difference.logical_not().nonzero().squeeze(-1)
            bias = student.bias.to(student.dtype) * student.transform.product_scale
            for row in whole.tolist():
                self._teacher_tile[row].add_(bias)

    def statistics(
        self, rows: slice, local: slice, target_ids: torch.Tensor | None, want_entropy: bool
    ) -> DivergenceRows:
        statistics, self._state = self._tiles.divergence(
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
        self._tiles.divergence_gradient(self._student_tile[local], self._state, target_ids, weight, logprob_weight)

    def gradient_tile(self, count: int) -> torch.Tensor:
        return self._student_tile[:count]
