"""Chunked divergence: library products into float32 tiles of a block of rows, whose statistics a kernel takes in one
read. docs/gpu.md compares this design with the fused one.

A JSD without a gradient is made here whatever the operands: it keeps all of its digits so.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from unisd_kernels.backends.base import DivergenceRows, NeedsGrad, ShardRows, WholeRows
from unisd_kernels.backends.buffers import row_buffer, row_stride
from unisd_kernels.backends.projection import Projection
from unisd_kernels.backends.triton.divergence import TritonDivergence
from unisd_kernels.backends.triton.gradients import Saved
from unisd_kernels.backends.triton.launch import ROW_PADDING, LogitTile, on_device, tile_grid
from unisd_kernels.backends.triton.math import COUNTS, tile_block
from unisd_kernels.backends.triton.mixture import mix
from unisd_kernels.backends.triton.rows import teacher_rows
from unisd_kernels.backends.triton.statistics import (
    DIVERGENCE,
    MASKED,
    STUDENT_KL,
    Partials,
    chunk_and_block_rows,
    combine,
    divergence_rows,
    load_logits,
    partials_bytes,
    shard_rows,
    store_partials,
    take_whole,
)
from unisd_kernels.backends.triton.variants import launch_variant

# A block of statistics that are taken from logits in memory. Its numbers stay in registers between the passes over them
# (maximum, sums, the teacher's): 16 of each view a thread. Few warps, because each of the block's eight sums is a wait
# of all of them for one another (docs/gpu.md has what an H100 made of it).
STATISTICS_ROWS, STATISTICS_COLUMNS, STATISTICS_WARPS = 1, 1024, 2


@triton.jit(do_not_specialize=COUNTS)
def block_statistics_kernel(
    student,  # launch.LogitTile, [num_rows, num_columns] float32
    teacher,  # launch.LogitTile, [num_rows, num_columns] float32
    row_is_delta,  # [rows] int8, or None: none is
    partials,  # statistics.Partials.values
    num_rows,
    num_columns,
    num_blocks,
    WANT_ENTROPY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Partial statistics of float32 tiles that library products made. One read of each."""
    block, row_block = tile_block(num_columns, BLOCK_COLUMNS)
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < num_rows
    column_mask = columns < num_columns
    mask = row_mask[:, None] & column_mask[None, :]
    is_delta = row_is_delta
    if row_is_delta is not None:
        is_delta = (tl.load(row_is_delta + rows, mask=row_mask, other=0) != 0)[:, None]
    z, delta, teacher_z = load_logits(student, teacher, rows.to(tl.int64)[:, None], columns[None, :], mask, is_delta)
    z = tl.where(column_mask[None, :], z, MASKED)
    teacher_z = tl.where(column_mask[None, :], teacher_z, MASKED)
    store_partials(partials, z, delta, teacher_z, row_mask, rows, num_rows, block, num_blocks, WANT_ENTROPY)


class ChunkedDivergence(TritonDivergence):
    """Any divergence by library products, a pass for the statistics and, of a mixture, one more for its sums.

    See `unisd_kernels.backends.base.Divergence`. The gradient of a chunk lies in one buffer of the operands' dtype; the
    logits of a block in others, or the student's, where the dtypes are one, in the gradient's own place.
    """

    shifted = False

    def __init__(
        self, student: Projection, teacher: Projection, beta: float, workspace_bytes: int, needs_grad: NeedsGrad
    ) -> None:
        self._student, self._teacher, self._beta, self._needs_grad = student, teacher, beta, needs_grad.any
        dtype, device, columns = student.hidden.dtype, student.hidden.device, student.num_columns
        in_place = needs_grad.any and dtype == torch.float32
        sizing = student.sizing_columns
        stride = row_stride(sizing, ROW_PADDING)
        self.chunk_rows, self.block_rows = _, block = chunk_and_block_rows(
            student,
            workspace_bytes,
            stride * dtype.itemsize if needs_grad.any else 0,
            stride * torch.float32.itemsize * (1 if in_place else 2) + partials_bytes(sizing, STATISTICS_COLUMNS),
        )
        self._teacher_logits = row_buffer(block, columns, ROW_PADDING, torch.float32, device)
        self._student_logits: torch.Tensor | None = None
        if not in_place:
            self._student_logits = row_buffer(block, columns, ROW_PADDING, torch.float32, device)
        if needs_grad.any:
            self._gradient = row_buffer(self.chunk_rows, columns, ROW_PADDING, dtype, device)

    def forward(
        self, chunk: None, rows: slice, local: slice, target_ids: torch.Tensor | None, want_entropy: bool
    ) -> tuple[DivergenceRows, Saved | None]:
        saved = self._take(rows, local, target_ids, want_entropy)
        if 0.0 < self._beta < 1.0:
            self._mix(saved)
        result = divergence_rows(saved.statistics, target_ids is not None, want_entropy)
        return result, saved if self._needs_grad else None

    def shard_forward(
        self, chunk: None, rows: slice, local: slice, target_ids: torch.Tensor | None, want_entropy: bool
    ) -> tuple[ShardRows, Saved]:
        saved = self._take(rows, local, target_ids, want_entropy)
        mixture = 0.0 < self._beta < 1.0
        return shard_rows(saved.statistics, mixture, target_ids is not None, want_entropy), saved

    def shard_mixture(self, saved: Saved, whole: WholeRows) -> torch.Tensor:
        take_whole(saved.statistics, whole, self._beta)
        self._mix(saved)
        return saved.statistics[[DIVERGENCE.value, STUDENT_KL.value]]

    def shard_backward(
        self,
        saved: Saved,
        whole: WholeRows,
        target_ids: torch.Tensor | None,
        weight: torch.Tensor | None,
        logprob_weight: torch.Tensor | None,
    ) -> None:
        take_whole(saved.statistics, whole, self._beta)
        self.backward(saved, target_ids, weight, logprob_weight)

    def _mix(self, saved: Saved) -> None:
        """Write the sums of a mixture to the statistics, which have its log-sum-exps."""
        columns = self._student.num_columns
        tiles = saved.student, saved.teacher, saved.row_is_delta
        with on_device(saved.statistics):
            mix(*tiles, saved.partials, saved.statistics, self._beta, columns, shifted=False)

    def _take(self, rows: slice, local: slice, target_ids: torch.Tensor | None, want_entropy: bool) -> Saved:
        """Logits and statistics of a block; those of a mixture without its sums."""
        student = self._student.of_rows(self._student.hidden[rows])
        count, columns, device = rows.stop - rows.start, student.num_columns, student.hidden.device
        z = self._gradient[local] if self._student_logits is None else self._student_logits[:count]
        other = self._teacher_logits[:count]
        tiles = LogitTile.of(z, student.transform), LogitTile.of(other, self._teacher.transform)
        with on_device(z):
            teacher, row_is_delta = teacher_rows(student, self._teacher.of_rows(self._teacher.hidden[rows]))
            student.logits(slice(0, count), z)
            teacher.logits(slice(0, count), other)
            if teacher.bias is not None and row_is_delta is not None:
                # The products added the bias to differences too.
                bias = teacher.bias.float().mul(teacher.transform.product_scale)
                other.addcmul_(row_is_delta.float().unsqueeze(-1), bias, value=-1.0)
            partials = Partials.empty(count, columns, STATISTICS_COLUMNS, want_entropy, device)
            launch_variant(
                block_statistics_kernel,
                tile_grid(z, STATISTICS_ROWS, STATISTICS_COLUMNS),
                *tiles,
                row_is_delta,
                partials.values,
                count,
                columns,
                partials.num_blocks,
                WANT_ENTROPY=want_entropy,
                BLOCK_ROWS=STATISTICS_ROWS,
                BLOCK_COLUMNS=STATISTICS_COLUMNS,
                num_warps=STATISTICS_WARPS,
            )
            statistics = combine(partials, student, teacher, row_is_delta, target_ids, want_entropy, self._beta)
        gradient = self._gradient[local] if self._needs_grad else z[:0]
        return Saved(*tiles, row_is_delta, partials, statistics, gradient)
