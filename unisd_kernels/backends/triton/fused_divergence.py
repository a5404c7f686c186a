"""Fused divergence: student and teacher through the vocabulary at once, in one product kernel with the statistics
behind it. docs/gpu.md compares this design with the chunked one.

A program makes the same tile of both logits, takes the block's statistics (statistics.py) while they are in registers,
and stores what the gradient needs: z_s and delta = z_t - z_s (or z_t, where a forward KL is far off), each less its
block's reference. Near the reference, where the probability is, the shifted numbers are small, so that 16 bits hold
them with the relative precision the gradient is rounded to anyway; the divergence itself never sees the rounded ones.

float16 (for bfloat16 operands too) rounds x to e |x|, e = 2^-11. With mu the mean of delta over a block under p_s:

    reverse   the gradient is -p_s (delta - r) = -p_s (x + mu - r), x = delta - mu, and is off by e p_s |x|. Over a
              block sum p_s |x| <= 2 sum p_s |delta - r|: at most 2 e of the gradient, however far the teacher is.
    forward   the gradient has p_t, off by e p_t |x|. Of the block's p_t, E_t[|x|] < E_t[x] + 1 (a negative x has
              p_t |x| = p_s e^x |x|); if E_t[x] > 1 the block is far and stores z_t - max z_t instead.

    JSD       the gradient is p_s times a function of delta whose slope is p_t's share of the mixture. As forward: where
              z_t is rounded far from its maximum, and p_s is not nothing, that share is. Its sums, which need both
              log-sum-exps first, are taken of the rounded numbers in a pass of their own (mixture.py): D is off by
              their e, not by float32's.

Weighted by p_s, as in a reverse KL, z_t would be rounded where it is far from its maximum: by e times hundreds.

Under a soft cap, z_s in [-C, C], the gradient has the slope (1 - z_s / C) (1 + z_s / C) too. What is stored of z_s is
its distance to the block's maximum or, where that is the shorter one, to -C, as a positive number. It is then no larger
than C - z_s and no larger than C + z_s, so that both factors are off by e of themselves at most, also at saturation.

What it saves: the two views read the weight once, and 2 + 2 bytes a pair of logits are stored in place of 4 + 4 written
and read again for the statistics. What it costs: an epilogue of 60 instructions a pair (sm_90), which no product hides
while one program at a time is on a multiprocessor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from unisd_kernels.backends.base import DivergenceRows, NeedsGrad
from unisd_kernels.backends.buffers import row_buffer, row_major, row_stride
from unisd_kernels.backends.projection import Projection
from unisd_kernels.backends.triton.configs import GemmConfig, autotuning, candidates, choose, with_loads
from unisd_kernels.backends.triton.divergence import TritonDivergence
from unisd_kernels.backends.triton.gemm import Side, gemm_tile, load_tile
from unisd_kernels.backends.triton.gradients import Saved
from unisd_kernels.backends.triton.launch import ROW_PADDING, LogitTile, ceil_div, gemm_operands, num_sms, on_device
from unisd_kernels.backends.triton.math import COUNTS, apply_softcap
from unisd_kernels.backends.triton.mixture import mix
from unisd_kernels.backends.triton.rows import teacher_rows
from unisd_kernels.backends.triton.shifted import LARGEST
from unisd_kernels.backends.triton.statistics import (
    MASKED,
    Partials,
    chunk_and_block_rows,
    combine,
    divergence_rows,
    partials_bytes,
    store_partials,
)
from unisd_kernels.backends.triton.variants import launch_variant

# float16's smallest number above 0.
_SMALLEST = tl.constexpr(2.0**-24)


@triton.jit
def column_part(tile, PART: tl.constexpr, PARTS: tl.constexpr):
    """Part `PART` of `PARTS` (1, 2 or 4) of the columns of a tile, taken from registers."""
    if PARTS == 1:
        return tile
    else:
        ROWS: tl.constexpr = tile.shape[0]
        COLUMNS: tl.constexpr = tile.shape[1]
        left, right = tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
        HALF: tl.constexpr = PARTS // 2
        if PART < HALF:
            return column_part(left, PART, HALF)
        else:
            return column_part(right, PART - HALF, HALF)


@triton.jit
def finish_block(
    z,  # [BLOCK_ROWS, BLOCK_COLUMNS] products of the student
    other,  # [BLOCK_ROWS, BLOCK_COLUMNS] products of the teacher
    student,  # gemm.Side
    teacher,  # gemm.Side
    block,
    first_column,
    is_delta,  # [BLOCK_ROWS]: does the teacher's row hold h_t - h_s?
    rows,
    row_mask,
    student_out,  # launch.LogitTile, or None without a gradient
    teacher_out,
    partials,
    num_rows,
    num_columns,
    num_blocks,
    TEACHER_IS_DELTA: tl.constexpr,  # may `is_delta` be true?
    WANT_ENTROPY: tl.constexpr,
    STORE: tl.constexpr,
    KEEP_FAR: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,  # is every column there?
    BLOCK_COLUMNS: tl.constexpr,
):
    """Make partial statistics and, if asked for, shifted logits of the products of one block of columns."""
    columns = first_column + tl.arange(0, BLOCK_COLUMNS)
    column_mask = columns < num_columns
    if student.bias is not None:
        z += tl.load(student.bias + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if teacher.bias is not None:
        bias = tl.load(teacher.bias + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        if TEACHER_IS_DELTA:
            # A difference of hidden states gives a difference of logits, in which the bias is gone.
            bias = tl.where(is_delta[:, None], 0.0, bias)
        other += bias
    z = apply_softcap(z * student.scale, student.tanh_scale)
    other = apply_softcap(other * teacher.scale, teacher.tanh_scale)
    if TEACHER_IS_DELTA:
        # Where z_s is not finite, so is this: 0 times it is a NaN.
        held = tl.where(is_delta, 1.0, 0.0)[:, None]
        delta = other - (1.0 - held) * z
        other = other + held * z
    else:
        delta = other - z
    if not EVEN_COLUMNS:
        z = tl.where(column_mask[None, :], z, MASKED)
        other = tl.where(column_mask[None, :], other, MASKED)
    highest, shift, teacher_highest, far = store_partials(
        partials, z, delta, other, row_mask, rows, num_rows, block, num_blocks, WANT_ENTROPY
    )
    if STORE:
        # Rows are padded, so that a whole vector is written also where the vocabulary ends within one.
        wide = rows.to(tl.int64)[:, None]
        # The teacher's first, whose third tile of numbers is then done with: the other way round the assembler spills.
        mask = row_mask[:, None] & (columns < teacher_out.stride)[None, :]
        away = delta - shift[:, None]
        if KEEP_FAR:
            # Far from the student the teacher's own logit is the better one to round: where p_t is, it is near its
            # maximum.
            away = tl.where(far[:, None], other - teacher_highest[:, None], away)
        away = tl.minimum(tl.maximum(away, -LARGEST), LARGEST)
        tl.store(
            teacher_out.logits + wide * teacher_out.stride + columns[None, :],
            away.to(teacher_out.logits.dtype.element_ty),
            mask=mask,
        )
        mask = row_mask[:, None] & (columns < student_out.stride)[None, :]
        # z_s less the block's maximum and delta less the block's mean, and not less the row's: those are known when
        # all blocks are. A block away from the row's maximum has less probability, and needs no more digits.
        # A logit further below its block's maximum than float16 reaches has no probability: any number will do.
        low = tl.maximum(z - highest[:, None], -LARGEST)
        if student.tanh_scale is not None:
            # Of a masked column both are as large; a distance of 0 is to the maximum.
            above = tl.abs(z + student.tanh_scale)
            low = tl.where(above < highest[:, None] - z, tl.maximum(above, _SMALLEST), low)
        tl.store(
            student_out.logits + wide * student_out.stride + columns[None, :],
            low.to(student_out.logits.dtype.element_ty),
            mask=mask,
        )


@triton.jit(do_not_specialize=COUNTS)
def fused_divergence_kernel(
    student_hidden,  # [num_rows, H]
    teacher_hidden,  # [num_rows, H of the teacher]
    student_weight,  # [num_columns, H]
    teacher_weight,
    row_is_delta,  # [rows] int8: does the row of teacher_hidden hold h_t - h_s? None: no row does
    student_out,  # launch.LogitTile for the gradient, or None without one
    teacher_out,
    partials,  # statistics.Partials.values
    # Behind the pointers: before them the assembler spills 40 bytes of sm_100's tile of two capped heads.
    student,  # gemm.Side
    teacher,  # gemm.Side
    num_rows,
    num_columns,
    num_blocks,
    num_programs,
    SHARED_WEIGHT: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    STORE: tl.constexpr,  # write student_out and teacher_out? (Triton 3.6 cannot ask whether a tuple is None)
    KEEP_FAR: tl.constexpr,  # keep z_t where the teacher is far? Not for a reverse KL
    EVEN_COLUMNS: tl.constexpr,  # does the vocabulary end with a tile?
    DESCRIPTORS: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    FLATTEN: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PARTS: tl.constexpr,  # 1, 2 or 4 blocks of statistics a tile; the more, the fewer registers are live at a time
):
    TEACHER_IS_DELTA: tl.constexpr = row_is_delta is not None
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    num_tiles = row_blocks * tl.cdiv(num_columns, BLOCK_COLUMNS)
    # As many programs as the device runs at a time, each with every num_programs-th tile: the loads of a tile can run
    # ahead into the end of the last one (FLATTEN), where warps wait for exponentials and not for memory.
    for tile in tl.range(tl.program_id(0), num_tiles, num_programs, flatten=FLATTEN, warp_specialize=WARP_SPECIALIZE):
        # Tiles of the same columns run together: the weight comes from memory once, the hidden states stay cached.
        first_row = (tile % row_blocks) * BLOCK_ROWS
        first_column = (tile // row_blocks) * BLOCK_COLUMNS
        z = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        other = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        if SHARED_WEIGHT:
            for step in range(tl.cdiv(student.width, BLOCK_WIDTH)):
                k = step * BLOCK_WIDTH
                h = load_tile(
                    student_hidden,
                    first_row,
                    num_rows,
                    k,
                    student.width,
                    student.hidden_stride,
                    DESCRIPTORS,
                    EVEN_WIDTH,
                    BLOCK_ROWS,
                    BLOCK_WIDTH,
                )
                x = load_tile(
                    teacher_hidden,
                    first_row,
                    num_rows,
                    k,
                    student.width,
                    teacher.hidden_stride,
                    DESCRIPTORS,
                    EVEN_WIDTH,
                    BLOCK_ROWS,
                    BLOCK_WIDTH,
                )
                w = load_tile(
                    student_weight,
                    first_column,
                    num_columns,
                    k,
                    student.width,
                    student.weight_stride,
                    DESCRIPTORS,
                    EVEN_WIDTH,
                    BLOCK_COLUMNS,
                    BLOCK_WIDTH,
                )
                z = tl.dot(h, w.T, z, input_precision=PRECISION)
                other = tl.dot(x, w.T, other, input_precision=PRECISION)
        else:
            z = gemm_tile(
                student_hidden,
                student_weight,
                student,
                first_row,
                num_rows,
                first_column,
                num_columns,
                DESCRIPTORS,
                EVEN_WIDTH,
                PRECISION,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                BLOCK_WIDTH,
            )
            other = gemm_tile(
                teacher_hidden,
                teacher_weight,
                teacher,
                first_row,
                num_rows,
                first_column,
                num_columns,
                DESCRIPTORS,
                EVEN_WIDTH,
                PRECISION,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                BLOCK_WIDTH,
            )
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        row_mask = rows < num_rows
        is_delta = row_mask
        if TEACHER_IS_DELTA:
            is_delta = tl.load(row_is_delta + rows, mask=row_mask, other=0) != 0
        WIDTH: tl.constexpr = BLOCK_COLUMNS // PARTS
        for part in tl.static_range(PARTS):
            z_part = column_part(z, part, PARTS)
            other_part = column_part(other, part, PARTS)
            block = (tile // row_blocks) * PARTS + part
            # A tile at the end of the vocabulary may have nothing in its right half: nothing of it is written.
            finish_block(
                z_part,
                other_part,
                student,
                teacher,
                block,
                first_column + part * WIDTH,
                is_delta,
                rows,
                row_mask & (block + tl.zeros_like(rows) < num_blocks),
                student_out,
                teacher_out,
                partials,
                num_rows,
                num_columns,
                num_blocks,
                TEACHER_IS_DELTA,
                WANT_ENTROPY,
                STORE,
                KEEP_FAR,
                EVEN_COLUMNS,
                WIDTH,
            )


class FusedDivergence(TritonDivergence):
    """A divergence by one product kernel for both views; what the gradient, and the sums of a mixture, need in 16 bits
    (32 for float32 operands).

    See `unisd_kernels.backends.base.Divergence`. The student's shifted logits lie where the gradient of their rows
    will, which overwrites them; the teacher's in a buffer for one block.
    """

    shifted = True

    def __init__(
        self, student: Projection, teacher: Projection, beta: float, workspace_bytes: int, needs_grad: NeedsGrad
    ) -> None:
        self._shared = student.weight_is(teacher)
        self._student, self._teacher = student, teacher = _row_major_pair(student, teacher)
        self._beta, self._needs_grad = beta, needs_grad.any
        self._is_mixture = 0.0 < beta < 1.0
        # Its sums are taken of what is stored for the gradient.
        assert self._needs_grad or not self._is_mixture, "a mixture without a gradient is a chunked one's"
        self._kind = _kind(student, teacher, self._shared)
        dtype, device, columns = student.hidden.dtype, student.hidden.device, student.num_columns
        options = candidates(self._kind, device) if autotuning() else candidates(self._kind, device)[:1]
        narrowest = min(config.columns // config.parts for config in options)
        row_bytes = row_stride(columns, ROW_PADDING) * dtype.itemsize if needs_grad.any else 0
        self.chunk_rows, self.block_rows = _, block = chunk_and_block_rows(
            student, workspace_bytes, row_bytes, row_bytes + partials_bytes(columns, narrowest)
        )
        if needs_grad.any:
            self._gradient = row_buffer(self.chunk_rows, columns, ROW_PADDING, dtype, device)
            # Of a bfloat16 student too: the shifted numbers are small where they count, and float16 has eight times the
            # digits.
            stored = torch.float32 if dtype == torch.float32 else torch.float16
            self._shifted = row_buffer(block, columns, ROW_PADDING, stored, device)

    def forward(
        self, chunk: None, rows: slice, local: slice, target_ids: torch.Tensor | None, want_entropy: bool
    ) -> tuple[DivergenceRows, Saved | None]:
        student = self._student.of_rows(self._student.hidden[rows])
        hidden, count = student.hidden, rows.stop - rows.start
        tiles: tuple[LogitTile | None, LogitTile | None] = None, None
        if self._needs_grad:
            gradient = self._gradient[local]
            tiles = (
                LogitTile.of(gradient.view(self._shifted.dtype), student.transform),
                LogitTile.of(self._shifted[:count], self._teacher.transform),
            )
        with on_device(hidden):
            teacher, row_is_delta = teacher_rows(student, self._teacher.of_rows(self._teacher.hidden[rows]))

            def launch(config: GemmConfig) -> Partials:
                return self._launch(config, student, teacher, row_is_delta, tiles, want_entropy)

            shape = (count, student.num_columns, hidden.shape[1])
            partials = launch(choose(self._kind, hidden.device, shape, launch))
            statistics = combine(partials, student, teacher, row_is_delta, target_ids, want_entropy, self._beta)
            if self._is_mixture:
                mix(*_both(tiles), row_is_delta, partials, statistics, self._beta, student.num_columns, shifted=True)
        result = divergence_rows(statistics, target_ids is not None, want_entropy)
        if not self._needs_grad:
            return result, None
        return result, Saved(*_both(tiles), row_is_delta, partials, statistics, gradient)

    def _launch(
        self,
        config: GemmConfig,
        student: Projection,
        teacher: Projection,
        row_is_delta: torch.Tensor | None,
        tiles: tuple[LogitTile | None, LogitTile | None],
        want_entropy: bool,
    ) -> Partials:
        num_rows, num_columns, device = student.hidden.shape[0], student.num_columns, student.hidden.device
        partials = Partials.empty(num_rows, num_columns, config.columns // config.parts, want_entropy, device)
        operands, constants = gemm_operands(config, (student.hidden, teacher.hidden), (student.weight, teacher.weight))
        num_tiles = ceil_div(num_rows, config.rows) * ceil_div(num_columns, config.columns)
        programs = min(num_tiles, config.occupancy * num_sms(device))
        launch_variant(
            fused_divergence_kernel,
            (programs,),
            *operands,
            row_is_delta,
            *tiles,
            partials.values,
            Side.of(student),
            Side.of(teacher),
            num_rows,
            num_columns,
            partials.num_blocks,
            programs,
            SHARED_WEIGHT=self._shared,
            WANT_ENTROPY=want_entropy,
            STORE=self._needs_grad,
            KEEP_FAR=self._beta != 1.0,
            EVEN_COLUMNS=num_columns % config.columns == 0,
            FLATTEN=config.flatten,
            PARTS=config.parts,
            **constants,
        )
        return partials


def _both(tiles: tuple[LogitTile | None, LogitTile | None]) -> tuple[LogitTile, LogitTile]:
    """The two tiles, of a block that stores."""
    student, teacher = tiles
    assert student is not None
    assert teacher is not None
    return student, teacher


def _kind(student: Projection, teacher: Projection, shared: bool) -> str:
    """The kind of tile (`configs.py`)."""
    kind = "fused-divergence" if shared else "fused-divergence-separate"
    if torch.float32 in (student.hidden.dtype, teacher.hidden.dtype):
        return f"{kind}-float32"
    # Rows that start off alignment are not aligned as blocks of rows either, nor the other way round.
    of_operands = with_loads(kind, student.hidden, teacher.hidden, student.weight, teacher.weight)
    heavy = any(side.bias is not None or side.transform.softcap is not None for side in (student, teacher))
    return "fused-divergence-heavy" if of_operands == "fused-divergence" and heavy else of_operands


def _row_major_pair(student: Projection, teacher: Projection) -> tuple[Projection, Projection]:
    """Both with contiguous rows, and still sharing what they share."""
    copies: dict[tuple[int, torch.Size, tuple[int, ...]], torch.Tensor] = {}

    def once(matrix: torch.Tensor) -> torch.Tensor:
        key = (matrix.data_ptr(), matrix.shape, matrix.stride())
        if key not in copies:
            copies[key] = row_major(matrix) if matrix.dim() == 2 else matrix.contiguous()
        return copies[key]

    def of(projection: Projection) -> Projection:
        bias = None if projection.bias is None else once(projection.bias)
        return Projection(once(projection.hidden), once(projection.weight), bias, projection.transform)

    return of(student), of(teacher)
