"""One tile of a matrix product, shared by the kernels that fuse something behind it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from unisd_kernels.backends.projection import Projection


class Side(NamedTuple):
    """One view's side of a product as the kernels take it, but for its two matrices: those may be tensor descriptors,
    which Triton launches as arguments of their own only, not inside tuples.

    A kernel reads of None that there is no bias or no soft cap: a variant is compiled without, and no flag says so.
    """

    bias: torch.Tensor | None  # [V]
    width: int  # H
    hidden_stride: int
    weight_stride: int
    scale: float  # `LogitTransform.product_scale`
    tanh_scale: float | None  # of a soft cap

    @classmethod
    def of(cls, projection: Projection) -> Side:
        hidden, weight, transform = projection.hidden, projection.weight, projection.transform
        strides = hidden.stride(0), weight.stride(0)
        return cls(projection.bias, hidden.shape[1], *strides, transform.product_scale, transform.tanh_scale)


@triton.jit
def load_tile(
    source,  # [num_rows, num_columns], row-major, or its descriptor
    first_row,
    num_rows,
    first_column,
    num_columns,
    stride,
    DESCRIPTOR: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """[BLOCK_ROWS, BLOCK_COLUMNS] of a matrix, zero in columns outside it. `EVEN`: its width is a multiple of the
    block. Rows outside it hold anything that is a number if the matrix does."""
    if DESCRIPTOR:
        return source.load([first_row, first_column])
    else:
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        columns = first_column + tl.arange(0, BLOCK_COLUMNS)
        # Rows beyond the end are read from the last one: their results are never used, and a mask costs registers.
        # A large head has more than 2^31 elements.
        inside = tl.minimum(rows, num_rows - 1).to(tl.int64)
        pointers = source + inside[:, None] * stride + columns[None, :]
        if EVEN:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=columns[None, :] < num_columns, other=0.0)


@triton.jit
def gemm_tile(
    hidden,  # [num_rows, H]
    weight,  # [num_columns, H]
    side,  # Side
    first_row,
    num_rows,
    first_column,
    num_columns,
    DESCRIPTORS: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """float32 `h W^T` of one tile, [BLOCK_ROWS, BLOCK_COLUMNS]."""
    sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for step in range(tl.cdiv(side.width, BLOCK_WIDTH)):
        k = step * BLOCK_WIDTH
        h = load_tile(
            hidden,
            first_row,
            num_rows,
            k,
            side.width,
            side.hidden_stride,
            DESCRIPTORS,
            EVEN_WIDTH,
            BLOCK_ROWS,
            BLOCK_WIDTH,
        )
        w = load_tile(
            weight,
            first_column,
            num_columns,
            k,
            side.width,
            side.weight_stride,
            DESCRIPTORS,
            EVEN_WIDTH,
            BLOCK_COLUMNS,
            BLOCK_WIDTH,
        )
        sums = tl.dot(h, w.T, sums, input_precision=PRECISION)
    return sums
