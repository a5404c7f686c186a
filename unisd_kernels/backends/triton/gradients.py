"""Gradients with respect to the logits, once the statistics of the rows are known. One read and one write.

All are gradients with respect to `a x / tau`: the factor of a soft cap's tanh is in them, the constant `a / tau` is
left to the small results. Formulas: docs/design.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from unisd_kernels.backends.triton.math import COUNTS, apply_softcap, cap_gradient, exp, expm1, log1p, tile_block
from unisd_kernels.backends.triton.statistics import (
    LOGSUMEXP_DIFFERENCE,
    MEAN_DIFFERENCE,
    MOMENT,
    RECORD,
    SHIFT,
    STUDENT_KL,
    STUDENT_LOGSUMEXP,
    STUDENT_MAX,
    TEACHER_LOGSUMEXP,
    TEACHER_MAX,
    TEACHER_SUM,
    is_far,
    load_pair,
)


@triton.jit(do_not_specialize=COUNTS)
def divergence_gradient_kernel(
    student,
    teacher,
    gradient,  # may be the student's tile: every element is read before it is written, by the same program
    is_difference,
    partials,
    statistics,
    target_ids,
    weight,
    logprob_weight,
    num_rows,
    num_columns,
    student_stride,
    teacher_stride,
    gradient_stride,
    num_blocks,
    student_tanh,
    teacher_tanh,
    beta,
    complement,  # 1 - beta, rounded once
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    SHIFTED: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_LOGPROB_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Of `sum_n weight_n D_n + logprob_weight_n logp_n(y_n)`.

    `SHIFTED`: the tiles hold z_s and z_t - z_s or z_t less the references of their block of `BLOCK_COLUMNS` columns
    (fused_divergence.py). Otherwise they hold `product_scale (h W^T + b)` in float32.
    """
    block, row_block = tile_block(num_columns, BLOCK_COLUMNS)
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < num_rows
    # Shifted tiles have padded rows, which are read and written to the end of a vector.
    end = student_stride if SHIFTED else num_columns
    mask = row_mask[:, None] & (columns < end)[None, :]
    wide = rows.to(tl.int64)[:, None]
    logsumexp = tl.load(statistics + STUDENT_LOGSUMEXP * num_rows + rows, mask=row_mask, other=0.0)
    difference = tl.load(statistics + LOGSUMEXP_DIFFERENCE * num_rows + rows, mask=row_mask, other=0.0)
    if FORWARD:
        teacher_logsumexp = tl.load(statistics + TEACHER_LOGSUMEXP * num_rows + rows, mask=row_mask, other=0.0)
    if SHIFTED:
        reference = partials + (rows * num_blocks + block) * RECORD
        highest = tl.load(reference + STUDENT_MAX, mask=row_mask, other=0.0)
        shift = tl.load(reference + SHIFT, mask=row_mask, other=0.0)
        z = tl.load(student + wide * student_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        d = tl.load(teacher + wide * teacher_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        base = highest[:, None]
        if STUDENT_SOFTCAP:
            # What is above 0 is relative to -C.
            base = tl.where(z > 0.0, -student_tanh, base)
            slope = ((student_tanh - base) - z) * ((student_tanh + base) + z) / (student_tanh * student_tanh)
        logprob = z + (base - logsumexp[:, None])
        if FORWARD:
            moment = tl.load(reference + MOMENT, mask=row_mask, other=0.0)
            teacher_sum = tl.load(reference + TEACHER_SUM, mask=row_mask, other=1.0)
            teacher_highest = tl.load(reference + TEACHER_MAX, mask=row_mask, other=0.0)
            far = is_far(highest, shift, teacher_highest, teacher_sum, moment)[:, None]
            # What the second tile holds is relative to the teacher's maximum where the teacher is far, else to the
            # shift.
            far_logprob = d + (teacher_highest - teacher_logsumexp)[:, None]
            d = tl.where(far, far_logprob - logprob, d + (shift - difference)[:, None])
            teacher_logprob = tl.where(far, far_logprob, logprob + d)
        else:
            delta, origin = d, shift
    else:
        given = tl.load(is_difference + rows, mask=row_mask, other=0) != 0
        z, delta, teacher_z = load_pair(
            student,
            teacher,
            wide * student_stride + columns[None, :],
            wide * teacher_stride + columns[None, :],
            mask,
            given[:, None],
            student_tanh,
            teacher_tanh,
            STUDENT_SOFTCAP,
            TEACHER_SOFTCAP,
        )
        origin = tl.zeros_like(difference)
        slope = cap_gradient(z, student_tanh, STUDENT_SOFTCAP)
        d = delta - difference[:, None]
        logprob = z - logsumexp[:, None]
        if FORWARD:
            teacher_logprob = teacher_z - teacher_logsumexp[:, None]
    p = exp(logprob)
    if FORWARD:
        # d = log p_t - log p_s.
        # p_s - p_t. Near each other as p_s times a small number; far out e^d may overflow where p_s is zero.
        result = tl.where(tl.abs(d) < 0.5, -p * expm1(d), p - exp(teacher_logprob))
    else:
        if REVERSE:
            # log p_s - log p_t - D = r - delta. Of what is stored, delta less the block's shift, the shift is brought
            # to the row's mean first: both may be far larger than their difference, which is what counts.
            mean = tl.load(statistics + MEAN_DIFFERENCE * num_rows + rows, mask=row_mask, other=0.0)
            result = -p * (delta + (origin - mean)[:, None])
        else:
            student_kl = tl.load(statistics + STUDENT_KL * num_rows + rows, mask=row_mask, other=0.0)
            # u = log(m / p_s) = log1p(beta expm1(d)); where that cancels or overflows, the logarithm of m over the
            # larger of the two. e^80 is still a number.
            growth = beta * expm1(tl.minimum(d, 80.0))
            smaller = exp(-tl.abs(d))
            share = tl.where(d > 0.0, beta + complement * smaller, complement + beta * smaller)
            of_larger = tl.maximum(d, 0.0) + tl.log(tl.maximum(share, 1e-37))
            usual = (growth >= -0.5) & (growth <= 1.0)
            u = tl.where(usual, log1p(tl.where(usual, growth, 0.0)), of_larger)
            result = -complement * p * (u + student_kl[:, None])
    if HAS_WEIGHT:
        result *= tl.load(weight + rows, mask=row_mask, other=0.0)[:, None]
    if HAS_LOGPROB_WEIGHT:
        of_logprob = tl.load(logprob_weight + rows, mask=row_mask, other=0.0)[:, None]
        targets = tl.load(target_ids + rows, mask=row_mask, other=-1).to(tl.int32)
        result += of_logprob * (tl.where(columns[None, :] == targets[:, None], 1.0, 0.0) - p)
    if STUDENT_SOFTCAP:
        result *= slope
    tl.store(gradient + wide * gradient_stride + columns[None, :], result.to(gradient.dtype.element_ty), mask=mask)


@triton.jit
def softmax_statistics_kernel(
    tile,
    target_ids,
    logsumexp,
    target_logits,
    num_columns,
    stride,
    tanh_scale,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Log-sum-exp and target logit of a complete float32 row. One program a row, one read."""
    row = tl.program_id(0)
    target = tl.load(target_ids + row)
    source = tile + row.to(tl.int64) * stride
    highest = tl.full([BLOCK_COLUMNS], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_COLUMNS], tl.float32)
    for start in range(0, num_columns, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        mask = columns < num_columns
        z = apply_softcap(tl.load(source + columns, mask=mask, other=0.0), tanh_scale, HAS_SOFTCAP)
        z = tl.where(mask, z, -float("inf"))
        higher = tl.maximum(highest, z)
        # A lane that has seen nothing yet holds -inf, and -inf - -inf is no number.
        seen = higher > -float("inf")
        total = tl.where(seen, total * exp(highest - higher) + exp(z - higher), total)
        total = tl.where(z != z, z, total)
        highest = higher
    top = tl.max(highest, 0)
    tl.store(logsumexp + row, top + tl.log(tl.sum(total * exp(highest - top), 0)))
    tl.store(target_logits + row, apply_softcap(tl.load(source + target), tanh_scale, HAS_SOFTCAP))


@triton.jit(do_not_specialize=COUNTS)
def logprob_gradient_kernel(
    tile,
    gradient,  # may be the tile
    logsumexp,
    target_ids,
    logprob_weight,
    logsumexp_weight,
    entropy,
    entropy_weight,
    num_rows,
    num_columns,
    tile_stride,
    gradient_stride,
    tanh_scale,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LOGPROB_WEIGHT: tl.constexpr,
    HAS_LOGSUMEXP_WEIGHT: tl.constexpr,
    HAS_ENTROPY_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Of `sum_n` weight times log-probability, log-sum-exp and entropy.

    d logp_y / dz = 1[y] - p,   d logsumexp / dz = p,   d entropy / dz = -p (log p + entropy)
    """
    block, row_block = tile_block(num_columns, BLOCK_COLUMNS)
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < num_rows
    mask = row_mask[:, None] & (columns < num_columns)[None, :]
    wide = rows.to(tl.int64)[:, None]
    x = tl.load(tile + wide * tile_stride + columns[None, :], mask=mask, other=0.0)
    z = apply_softcap(x, tanh_scale, HAS_SOFTCAP)
    logprob = z - tl.load(logsumexp + rows, mask=row_mask, other=0.0)[:, None]
    p = exp(logprob)
    of_p = tl.zeros([BLOCK_ROWS], tl.float32)
    if HAS_LOGSUMEXP_WEIGHT:
        of_p += tl.load(logsumexp_weight + rows, mask=row_mask, other=0.0)
    if HAS_LOGPROB_WEIGHT:
        of_logprob = tl.load(logprob_weight + rows, mask=row_mask, other=0.0)
        of_p -= of_logprob
    result = p * of_p[:, None]
    if HAS_ENTROPY_WEIGHT:
        of_entropy = tl.load(entropy_weight + rows, mask=row_mask, other=0.0)
        row_entropy = tl.load(entropy + rows, mask=row_mask, other=0.0)
        result -= of_entropy[:, None] * p * (logprob + row_entropy[:, None])
    if HAS_LOGPROB_WEIGHT:
        targets = tl.load(target_ids + rows, mask=row_mask, other=-1).to(tl.int32)
        result += tl.where(columns[None, :] == targets[:, None], of_logprob[:, None], 0.0)
    if HAS_SOFTCAP:
        result *= cap_gradient(z, tanh_scale, HAS_SOFTCAP)
    tl.store(gradient + wide * gradient_stride + columns[None, :], result.to(gradient.dtype.element_ty), mask=mask)
