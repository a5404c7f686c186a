"""Kernels on [N, H] rows of hidden states and their gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from unisd_kernels.backends.triton.math import apply_softcap


@triton.jit
def scale_rows_kernel(source, scale, out, num_columns, source_stride, out_stride, BLOCK_COLUMNS: tl.constexpr):
    """`out_n = scale_n source_n`, rounded once."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = columns < num_columns
    wide = row.to(tl.int64)
    values = tl.load(source + wide * source_stride + columns, mask=mask, other=0.0).to(tl.float32)
    values *= tl.load(scale + row).to(tl.float32)
    tl.store(out + wide * out_stride + columns, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def difference_rows_kernel(
    student,
    teacher,
    out,
    is_difference,
    num_columns,
    student_stride,
    teacher_stride,
    out_stride,
    rounding,  # relative error of a logit made of the rows as they are
    BLOCK_COLUMNS: tl.constexpr,
):
    """`out_n = h_t - h_s` where that, rounded to the rows' dtype, gives the better difference of logits; else `h_t`.

    Rounding the difference costs its norm a fraction; taking the difference after the product costs `rounding` of the
    norms of both. Similar rows of 16-bit numbers have differences that are exact, or nearly. A difference longer than
    h_t has nothing to save, and z_s + (z_t - z_s) would lose digits of z_t (Projection.minus).
    """
    row = tl.program_id(0).to(tl.int64)
    lost = tl.zeros([BLOCK_COLUMNS], tl.float32)
    size = tl.zeros([BLOCK_COLUMNS], tl.float32)
    longer = tl.zeros([BLOCK_COLUMNS], tl.float32)
    for start in range(0, num_columns, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        mask = columns < num_columns
        s = tl.load(student + row * student_stride + columns, mask=mask, other=0.0).to(tl.float32)
        t = tl.load(teacher + row * teacher_stride + columns, mask=mask, other=0.0).to(tl.float32)
        difference = t - s
        residual = difference - difference.to(out.dtype.element_ty).to(tl.float32)
        lost += residual * residual
        size += s * s + t * t
        # |d|^2 - |t|^2
        longer += s * (s - 2.0 * t)
    better = (tl.sum(lost, 0) <= rounding * rounding * tl.sum(size, 0)) & (tl.sum(longer, 0) <= 0.0)
    tl.store(is_difference + row, better.to(tl.int8))
    for start in range(0, num_columns, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        mask = columns < num_columns
        s = tl.load(student + row * student_stride + columns, mask=mask, other=0.0).to(tl.float32)
        t = tl.load(teacher + row * teacher_stride + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + row * out_stride + columns, tl.where(better, t - s, t).to(out.dtype.element_ty), mask=mask)


@triton.jit
def target_logits_kernel(
    hidden,
    weight,
    bias,
    is_difference,
    target_ids,
    out,
    width,
    hidden_stride,
    weight_stride,
    product_scale,
    tanh_scale,
    MARKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """The logit of one token a row: `softcap(a (h_n W_y + b_y)) / tau`. `MARKED` rows hold differences: no bias.

    A product of its own, because to look for the token in every tile of logits costs more than to read its row again.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ids + row).to(tl.int64)
    sums = tl.zeros([BLOCK_WIDTH], tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        k = start + tl.arange(0, BLOCK_WIDTH)
        mask = k < width
        h = tl.load(hidden + row * hidden_stride + k, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + target * weight_stride + k, mask=mask, other=0.0).to(tl.float32)
        sums += h * w
    x = tl.sum(sums, 0)
    if HAS_BIAS:
        b = tl.load(bias + target).to(tl.float32)
        if MARKED:
            b = tl.where(tl.load(is_difference + row) != 0, 0.0, b)
        x += b
    tl.store(out + row, apply_softcap(x * product_scale, tanh_scale, HAS_SOFTCAP))
