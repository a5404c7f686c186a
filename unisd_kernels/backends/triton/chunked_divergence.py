"""Chunked divergence: library products into float32 tiles of a block of rows, whose statistics a kernel takes in one
read. docs/gpu.md compares this design with the fused one.

The JSD is made here whatever the operands: its sums need the log-sum-exps of both views before the first of their
terms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from unisd_kernels.backends.base import DivergenceRows, NeedsGrad
from unisd_kernels.backends.buffers import row_buffer, row_stride
from unisd_kernels.backends.projection import Projection
from unisd_kernels.backends.triton.divergence import TritonDivergence
from unisd_kernels.backends.triton.gradients import Saved
from unisd_kernels.backends.triton.launch import ROW_PADDING, LogitTile, ceil_div, on_device, tile_grid
from unisd_kernels.backends.triton.math import (
    COUNTS,
    exp,
    expm1,
    expm1_remainder,
    log1p_remainder,
    nan_unless_finite,
    tile_block,
)
from unisd_kernels.backends.triton.rows import teacher_rows
from unisd_kernels.backends.triton.statistics import (
    DIVERGENCE,
    LOGSUMEXP_DIFFERENCE,
    MASKED,
    STUDENT_KL,
    STUDENT_LOGSUMEXP,
    TEACHER_LOGSUMEXP,
    Partials,
    chunk_and_block_rows,
    combine,
    divergence_rows,
    load_logits,
    partials_bytes,
    store_partials,
)

# A block of statistics that are taken from logits in memory. Its numbers stay in registers between the passes over them
# (maximum, sums, the teacher's): 16 of each view a thread. Few warps, because each of the block's eight sums is a wait
# of all of them for one another (docs/gpu.md has what an H100 made of it).
STATISTICS_ROWS, STATISTICS_COLUMNS, STATISTICS_WARPS = 1, 1024, 2
# Columns that one program sums for a mixture, and how many at a time. A block of logits has a few hundred rows: a
# program for each whole row would leave most of a GPU idle.
MIXTURE_COLUMNS, MIXTURE_BLOCK = 8192, 512
ROWS_OF_SUMS = 32


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


@triton.jit(do_not_specialize=COUNTS)
def mixture_kernel(
    student,  # launch.LogitTile, [num_rows, num_columns] float32
    teacher,  # launch.LogitTile, [num_rows, num_columns] float32
    row_is_delta,  # [rows] int8, or None: none is
    statistics,  # [NUM_STATISTICS, rows]
    sums,  # [2, num_splits, num_rows]: of the student's terms, of the teacher's
    num_rows,
    num_columns,
    num_splits,
    beta,
    complement,  # 1 - beta, rounded once
    SPLIT_COLUMNS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Sums for the generalized Jensen-Shannon divergence of one row, whose log-sum-exps are known, over a split of its
    columns. One program for each; `mixture_rows_kernel` adds them up.

    With `d = log p_t - log p_s`, the larger probability g, `q = -|d|`, `E = e^q - 1` and `w` the weight of the smaller
    probability in m: `log(m / g) = log1p(w E)`. To both KLs are added terms that sum to zero over the vocabulary,
    m - p_s and m - p_t, so that every term is of second order in d and not negative:

        g log(g / m) - g + m = g X,   X = w E - log1p(w E)
        e log(e / m) - e + m = g Y,   Y = (1 - w) E^2 + e^q (X - (E - q))       for the smaller one, e = g e^q
                                        = e^q (t - log1p(t)),   t = m / e - 1 = (1 - w) (e^-q - 1)

    Near w = 1 the first form of Y cancels unless t is large, and 1 + w E is (1 - w) + w e^q.

    Against the plain `sum p log(p / m)`: its terms are of first order in d and of both signs, so that a divergence of
    1e-6 is the rest of terms of 1e-3, and float32 leaves it four digits at best.
    """
    split, row = tl.program_id(0) % num_splits, tl.program_id(0) // num_splits
    is_delta = row_is_delta
    if row_is_delta is not None:
        is_delta = tl.load(row_is_delta + row) != 0
    logsumexp = tl.load(statistics + STUDENT_LOGSUMEXP * num_rows + row)
    difference = tl.load(statistics + LOGSUMEXP_DIFFERENCE * num_rows + row)
    teacher_logsumexp = tl.load(statistics + TEACHER_LOGSUMEXP * num_rows + row)
    student_terms = tl.zeros([BLOCK_COLUMNS], tl.float32)
    teacher_terms = tl.zeros([BLOCK_COLUMNS], tl.float32)
    wide = row.to(tl.int64)
    for start in range(0, SPLIT_COLUMNS, BLOCK_COLUMNS):
        columns = split * SPLIT_COLUMNS + start + tl.arange(0, BLOCK_COLUMNS)
        mask = columns < num_columns
        z, delta, teacher_z = load_logits(student, teacher, wide, columns, mask, is_delta)
        d = delta - difference
        student_logprob = tl.where(mask, z - logsumexp, -float("inf"))
        teacher_logprob = tl.where(mask, teacher_z - teacher_logsumexp, -float("inf"))
        larger = exp(tl.maximum(student_logprob, teacher_logprob))
        teacher_larger = d > 0.0
        weight = tl.where(teacher_larger, complement, beta)
        other_weight = tl.where(teacher_larger, beta, complement)
        q = tl.maximum(-tl.abs(d), -1e4)  # a finite number stands for infinity, and 0 times it is 0
        remainder = expm1_remainder(q)  # E - q
        e = expm1(q)
        ratio = exp(q)
        growth = weight * e
        # Below -0.4, where the series of log1p_remainder ends, nothing cancels in the logarithm itself.
        of_larger = tl.where(
            growth < -0.4,
            growth - tl.log(tl.maximum(other_weight + weight * ratio, 1e-37)),
            log1p_remainder(tl.maximum(growth, -0.4)),
        )
        # t times e^q, which unlike t does not overflow; beyond t = 1 the other form.
        t = tl.minimum(other_weight * -e, ratio)
        near = ratio * log1p_remainder(t / tl.maximum(ratio, 1e-37))
        of_smaller = other_weight * e * e + ratio * (of_larger - remainder)
        of_smaller = tl.where(t < ratio, near, of_smaller)
        student_terms += larger * tl.where(teacher_larger, of_smaller, of_larger)
        teacher_terms += larger * tl.where(teacher_larger, of_larger, of_smaller)
    out = sums + split * num_rows + row
    tl.store(out, tl.sum(student_terms, 0))
    tl.store(out + num_splits * num_rows, tl.sum(teacher_terms, 0))


@triton.jit(do_not_specialize=COUNTS)
def mixture_rows_kernel(
    sums,  # [2, num_splits, num_rows]
    statistics,  # [NUM_STATISTICS, rows]
    num_rows,
    num_splits,
    beta,
    complement,  # 1 - beta, rounded once
    BLOCK_ROWS: tl.constexpr,
):
    """The divergence and its student's part of some rows, from the sums of `mixture_kernel`, always in one order."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = rows < num_rows
    student_kl = tl.zeros([BLOCK_ROWS], tl.float32)
    teacher_kl = tl.zeros([BLOCK_ROWS], tl.float32)
    for split in range(num_splits):
        at = sums + split * num_rows + rows
        student_kl += tl.load(at, mask=mask, other=0.0)
        teacher_kl += tl.load(at + num_splits * num_rows, mask=mask, other=0.0)
    # The bounds in the terms make numbers of a NaN.
    student_kl += nan_unless_finite(tl.load(statistics + STUDENT_LOGSUMEXP * num_rows + rows, mask=mask, other=0.0))
    student_kl += nan_unless_finite(tl.load(statistics + LOGSUMEXP_DIFFERENCE * num_rows + rows, mask=mask, other=0.0))
    divergence = beta * teacher_kl + complement * student_kl
    tl.store(statistics + DIVERGENCE * num_rows + rows, tl.where(divergence < 0.0, 0.0, divergence), mask=mask)
    tl.store(statistics + STUDENT_KL * num_rows + rows, student_kl, mask=mask)


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
        stride = row_stride(columns, ROW_PADDING)
        self.chunk_rows, self.block_rows = _, block = chunk_and_block_rows(
            student,
            workspace_bytes,
            stride * dtype.itemsize if needs_grad.any else 0,
            stride * torch.float32.itemsize * (1 if in_place else 2) + partials_bytes(columns, STATISTICS_COLUMNS),
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
            block_statistics_kernel[tile_grid(z, STATISTICS_ROWS, STATISTICS_COLUMNS)](
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
            if 0.0 < self._beta < 1.0:
                self._mix(tiles, row_is_delta, statistics, count, columns)
        result = divergence_rows(statistics, target_ids is not None, want_entropy)
        if not self._needs_grad:
            return result, None
        return result, Saved(*tiles, row_is_delta, partials, statistics, self._gradient[local])

    def _mix(
        self,
        tiles: tuple[LogitTile, LogitTile],
        row_is_delta: torch.Tensor | None,
        statistics: torch.Tensor,
        num_rows: int,
        num_columns: int,
    ) -> None:
        """Write the divergence of a mixture to the statistics."""
        splits = ceil_div(num_columns, MIXTURE_COLUMNS)
        sums = torch.empty(2, splits, num_rows, dtype=torch.float32, device=statistics.device)
        weights = self._beta, 1.0 - self._beta
        mixture_kernel[(num_rows * splits,)](
            *tiles,
            row_is_delta,
            statistics,
            sums,
            num_rows,
            num_columns,
            splits,
            *weights,
            SPLIT_COLUMNS=MIXTURE_COLUMNS,
            BLOCK_COLUMNS=MIXTURE_BLOCK,
            num_warps=4,
        )
        mixture_rows_kernel[(ceil_div(num_rows, ROWS_OF_SUMS),)](
            sums, statistics, num_rows, splits, *weights, BLOCK_ROWS=ROWS_OF_SUMS, num_warps=1
        )
