"""Kernels on [N, H] rows of hidden states and their gradients, and their launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from unisd_kernels.backends.buffers import contiguous, row_major
from unisd_kernels.backends.projection import Projection
from unisd_kernels.backends.triton.gemm import Side
from unisd_kernels.backends.triton.launch import ceil_div, next_power_of_2, on_device
from unisd_kernels.backends.triton.math import apply_softcap
from unisd_kernels.backends.triton.variants import launch_variant

# A float32 sum of products of 16-bit numbers is off by about this fraction of the rows' norms.
_PRODUCT_ROUNDING = 2.0**-20


@triton.jit
def scale_rows_kernel(
    source,  # [N, H]
    scale,  # [N]
    out,  # [N, H]
    num_columns,
    source_stride,
    out_stride,
    BLOCK_COLUMNS: tl.constexpr,
):
    """`out_n = scale_n source_n`, rounded once."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = columns < num_columns
    wide = row.to(tl.int64)
    values = tl.load(source + wide * source_stride + columns, mask=mask, other=0.0).to(tl.float32)
    values *= tl.load(scale + row).to(tl.float32)
    tl.store(out + wide * out_stride + columns, values.to(out.dtype.element_ty), mask=mask)


def scale_rows(rows: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scale_n rows_n`, [N, H], rounded once to `dtype`; `scale` is [N]."""
    out = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    if not out.numel():
        return out
    columns = min(1024, next_power_of_2(rows.shape[1]))
    with on_device(rows):
        launch_variant(
            scale_rows_kernel,
            (rows.shape[0], ceil_div(rows.shape[1], columns)),
            rows,
            scale.contiguous(),
            out,
            rows.shape[1],
            rows.stride(0),
            out.stride(0),
            BLOCK_COLUMNS=columns,
        )
    return out


@triton.jit
def difference_rows_kernel(
    student,  # [N, H]
    teacher,  # [N, H]
    out,  # [N, H]
    row_is_delta,  # [N] int8
    num_columns,
    student_stride,
    teacher_stride,
    out_stride,
    rounding,  # relative error of a logit made of the rows as they are
    BLOCK_COLUMNS: tl.constexpr,
):
    """`out_n = h_t - h_s` where that, rounded to the rows' dtype, gives the better difference of logits; else `h_t`.

    Rounding the difference d costs the logits `|d - round(d)| |W_j|`; a difference taken after the two products costs
    `rounding` of the norms of both, `2^-20 |(h_s, h_t)| |W_j|`. So the difference is surely taken below 2^-12 of the
    rows' norm in bfloat16, which rounds it by 2^-8 of itself at most, below 2^-9 in float16, and always in float32. But
    it pays at any size where both rows lie on one grid, as near rows of 16-bit numbers do: differences of neighbours
    are exact, and D keeps all of its digits.

    A difference longer than h_t has nothing to save, and z_s + (z_t - z_s) would lose digits of z_t
    (`Projection.delta_rows`).
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
    tl.store(row_is_delta + row, better.to(tl.int8))
    for start in range(0, num_columns, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        mask = columns < num_columns
        s = tl.load(student + row * student_stride + columns, mask=mask, other=0.0).to(tl.float32)
        t = tl.load(teacher + row * teacher_stride + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + row * out_stride + columns, tl.where(better, t - s, t).to(out.dtype.element_ty), mask=mask)


def teacher_rows(student: Projection, teacher: Projection) -> tuple[Projection, torch.Tensor | None]:
    """The teacher's projection, of which some rows hold h_t - h_s; and which, [rows] int8, or None where the heads let
    none."""
    if not student.delta_is_projection(teacher):
        return teacher, None
    s, t = row_major(student.hidden), row_major(teacher.hidden)
    out = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    row_is_delta = torch.empty(s.shape[0], dtype=torch.int8, device=s.device)
    if out.numel():
        launch_variant(
            difference_rows_kernel,
            (s.shape[0],),
            s,
            t,
            out,
            row_is_delta,
            s.shape[1],
            s.stride(0),
            t.stride(0),
            out.stride(0),
            _PRODUCT_ROUNDING,
            BLOCK_COLUMNS=min(1024, next_power_of_2(s.shape[1])),
        )
    else:
        row_is_delta.zero_()
    return teacher.of_rows(out), row_is_delta


@triton.jit
def target_logit(hidden, weight, side, row_is_delta, target_ids, row, BLOCK_WIDTH: tl.constexpr):
    """The logit of one token of one row: `softcap(a (h_n W_y + b_y)) / tau`. A difference of hidden states has no bias.

    A product of its own, because to look for the token in every tile of logits costs more than to read its row again.
    """
    target = tl.load(target_ids + row).to(tl.int64)
    sums = tl.zeros([BLOCK_WIDTH], tl.float32)
    for start in range(0, side.width, BLOCK_WIDTH):
        k = start + tl.arange(0, BLOCK_WIDTH)
        mask = k < side.width
        h = tl.load(hidden + row * side.hidden_stride + k, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + target * side.weight_stride + k, mask=mask, other=0.0).to(tl.float32)
        sums += h * w
    x = tl.sum(sums, 0)
    if side.bias is not None:
        b = tl.load(side.bias + target).to(tl.float32)
        if row_is_delta is not None:
            b = tl.where(tl.load(row_is_delta + row) != 0, 0.0, b)
        x += b
    return apply_softcap(x * side.scale, side.tanh_scale)


@triton.jit
def target_logits_kernel(
    hidden,  # [N, H]
    weight,  # [V, H]
    side,  # gemm.Side
    row_is_delta,  # [N] int8, or None: none is
    target_ids,  # [N]
    out,  # [N]
    BLOCK_WIDTH: tl.constexpr,
):
    """The logit of one token a row."""
    row = tl.program_id(0).to(tl.int64)
    tl.store(out + row, target_logit(hidden, weight, side, row_is_delta, target_ids, row, BLOCK_WIDTH))


def target_logits(
    projection: Projection, row_is_delta: torch.Tensor | None, target_ids: torch.Tensor, out: torch.Tensor
) -> None:
    """Write the logit of one token a row, [rows] float32; without the bias where `row_is_delta` says so."""
    hidden, weight = row_major(projection.hidden), row_major(projection.weight)
    side = Side.of(Projection(hidden, weight, contiguous(projection.bias), projection.transform))
    launch_variant(
        target_logits_kernel,
        (hidden.shape[0],),
        hidden,
        weight,
        side,
        row_is_delta,
        target_ids,
        out,
        BLOCK_WIDTH=target_block(hidden.shape[1]),
    )


def target_block(width: int) -> int:
    """Elements of a row that `target_logit` takes at a time."""
    return min(1024, next_power_of_2(width))
