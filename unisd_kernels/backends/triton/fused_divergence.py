"""Student and teacher through the vocabulary at once: one product kernel with the statistics of a divergence behind it.

A program makes the same tile of both logits, takes the block's statistics (statistics.py) while they are in registers,
and stores what the gradient needs: z_s and delta = z_t - z_s (or z_t, where a forward KL is far off), each less its
block's reference. Near the reference, where the probability is, the shifted numbers are small, so that 16 bits hold
them with the relative precision the gradient is rounded to anyway; the divergence itself never sees the rounded ones.

float16 (for bfloat16 operands too) rounds x to e |x|, e = 2^-11. With mu the mean of delta over a block under p_s:

    reverse   the gradient is -p_s (delta - r) = -p_s (x + mu - r), x = delta - mu, and is off by e p_s |x|. Over a
              block sum p_s |x| <= 2 sum p_s |delta - r|: at most 2 e of the gradient, however far the teacher is.
    forward   the gradient has p_t, off by e p_t |x|. Of the block's p_t, E_t[|x|] < E_t[x] + 1 (a negative x has
              p_t |x| = p_s e^x |x|); if E_t[x] > 1 the block is far and stores z_t - max z_t instead.

Weighted by p_s, as in a reverse KL, z_t would be rounded where it is far from its maximum: by e times hundreds. A JSD
needs both and is not made here (backends/triton/backend.py).

Under a soft cap, z_s in [-C, C], the gradient has the slope (1 - z_s / C) (1 + z_s / C) too. What is stored of z_s is
its distance to the block's maximum or, where that is the shorter one, to -C, as a positive number. It is then no larger
than C - z_s and no larger than C + z_s, so that both factors are off by e of themselves at most, also at saturation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from unisd_kernels.backends.triton.gemm import gemm_tile, load_tile
from unisd_kernels.backends.triton.math import COUNTS, apply_softcap
from unisd_kernels.backends.triton.statistics import MASKED, store_partials

# float16's largest number, less a margin; what is beyond it has no probability.
_LARGEST = tl.constexpr(60000.0)
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
    z,
    other,
    block,
    first_column,
    given,
    rows,
    row_mask,
    student_bias,
    teacher_bias,
    shifted_student,
    shifted_teacher,
    partials,
    num_rows,
    num_columns,
    shifted_student_stride,
    shifted_teacher_stride,
    num_blocks,
    student_scale,
    teacher_scale,
    student_tanh,
    teacher_tanh,
    MARKED: tl.constexpr,
    STUDENT_BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    STORE: tl.constexpr,
    FORWARD: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    columns = first_column + tl.arange(0, BLOCK_COLUMNS)
    column_mask = columns < num_columns
    if STUDENT_BIAS:
        z += tl.load(student_bias + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if TEACHER_BIAS:
        bias = tl.load(teacher_bias + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        if MARKED:
            # A difference of hidden states gives a difference of logits, in which the bias is gone.
            bias = tl.where(given[:, None], 0.0, bias)
        other += bias
    z = apply_softcap(z * student_scale, student_tanh, STUDENT_SOFTCAP)
    other = apply_softcap(other * teacher_scale, teacher_tanh, TEACHER_SOFTCAP)
    if MARKED:
        delta = other - tl.where(given, 0.0, 1.0)[:, None] * z
        other = tl.where(given[:, None], z + other, other)
    else:
        delta = other - z
    z = tl.where(column_mask[None, :], z, MASKED)
    other = tl.where(column_mask[None, :], other, MASKED)
    highest, shift, teacher_highest, far = store_partials(
        partials, z, delta, other, row_mask, rows, num_rows, block, num_blocks, WANT_ENTROPY
    )
    if STORE:
        # Rows are padded, so that a whole vector is written also where the vocabulary ends within one.
        wide = rows.to(tl.int64)[:, None]
        mask = row_mask[:, None] & (columns < shifted_student_stride)[None, :]
        low = tl.maximum(z - highest[:, None], -_LARGEST)
        if STUDENT_SOFTCAP:
            # Of a masked column both are as large; a distance of 0 is to the maximum.
            above = tl.abs(z + student_tanh)
            low = tl.where(above < highest[:, None] - z, tl.maximum(above, _SMALLEST), low)
        tl.store(
            shifted_student + wide * shifted_student_stride + columns[None, :],
            low.to(shifted_student.dtype.element_ty),
            mask=mask,
        )
        mask = row_mask[:, None] & (columns < shifted_teacher_stride)[None, :]
        away = delta - shift[:, None]
        if FORWARD:
            # Far from the student the teacher's own logit is the better one to round: where p_t is, it is near its
            # maximum.
            away = tl.where(far[:, None], other - teacher_highest[:, None], away)
        away = tl.minimum(tl.maximum(away, -_LARGEST), _LARGEST)
        tl.store(
            shifted_teacher + wide * shifted_teacher_stride + columns[None, :],
            away.to(shifted_teacher.dtype.element_ty),
            mask=mask,
        )


@triton.jit(do_not_specialize=COUNTS)
def fused_divergence_kernel(
    student_hidden,
    teacher_hidden,
    student_weight,
    teacher_weight,
    student_bias,
    teacher_bias,
    is_difference,  # [rows] int8, if MARKED: does the row of teacher_hidden hold h_t - h_s?
    shifted_student,
    shifted_teacher,
    partials,
    num_rows,
    num_columns,
    student_width,
    teacher_width,
    student_hidden_stride,
    teacher_hidden_stride,
    student_weight_stride,
    teacher_weight_stride,
    shifted_student_stride,
    shifted_teacher_stride,
    num_blocks,
    num_programs,
    student_scale,
    teacher_scale,
    student_tanh,
    teacher_tanh,
    SHARED_WEIGHT: tl.constexpr,
    MARKED: tl.constexpr,
    STUDENT_BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    STORE: tl.constexpr,
    FORWARD: tl.constexpr,  # KL(p_t || p_s), or KL(p_s || p_t)? Decides what is stored
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
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    num_tiles = row_blocks * tl.cdiv(num_columns, BLOCK_COLUMNS)
    for tile in tl.range(tl.program_id(0), num_tiles, num_programs, flatten=FLATTEN, warp_specialize=WARP_SPECIALIZE):
        # Tiles of the same columns run together: the weight comes from memory once, the hidden states stay cached.
        first_row = (tile % row_blocks) * BLOCK_ROWS
        first_column = (tile // row_blocks) * BLOCK_COLUMNS
        z = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        other = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        if SHARED_WEIGHT:
            for step in range(tl.cdiv(student_width, BLOCK_WIDTH)):
                k = step * BLOCK_WIDTH
                h = load_tile(
                    student_hidden,
                    first_row,
                    num_rows,
                    k,
                    student_width,
                    student_hidden_stride,
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
                    student_width,
                    teacher_hidden_stride,
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
                    student_width,
                    student_weight_stride,
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
                first_row,
                num_rows,
                first_column,
                num_columns,
                student_width,
                student_hidden_stride,
                student_weight_stride,
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
                first_row,
                num_rows,
                first_column,
                num_columns,
                teacher_width,
                teacher_hidden_stride,
                teacher_weight_stride,
                DESCRIPTORS,
                EVEN_WIDTH,
                PRECISION,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                BLOCK_WIDTH,
            )
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        row_mask = rows < num_rows
        given = row_mask
        if MARKED:
            given = tl.load(is_difference + rows, mask=row_mask, other=0) != 0
        WIDTH: tl.constexpr = BLOCK_COLUMNS // PARTS
        for part in tl.static_range(PARTS):
            z_part = column_part(z, part, PARTS)
            other_part = column_part(other, part, PARTS)
            block = (tile // row_blocks) * PARTS + part
            # A tile at the end of the vocabulary may have nothing in its right half: nothing of it is written.
            finish_block(
                z_part,
                other_part,
                block,
                first_column + part * WIDTH,
                given,
                rows,
                row_mask & (block < num_blocks),
                student_bias,
                teacher_bias,
                shifted_student,
                shifted_teacher,
                partials,
                num_rows,
                num_columns,
                shifted_student_stride,
                shifted_teacher_stride,
                num_blocks,
                student_scale,
                teacher_scale,
                student_tanh,
                teacher_tanh,
                MARKED,
                STUDENT_BIAS,
                TEACHER_BIAS,
                STUDENT_SOFTCAP,
                TEACHER_SOFTCAP,
                WANT_ENTROPY,
                STORE,
                FORWARD,
                WIDTH,
            )
