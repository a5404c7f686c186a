"""One tile of a matrix product, shared by the kernels that fuse something behind it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(
    source,
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
    """[BLOCK_ROWS, BLOCK_COLUMNS] of a row-major matrix, zero outside. `EVEN`: the width is a multiple of the block."""
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
    hidden,
    weight,
    first_row,
    num_rows,
    first_column,
    num_columns,
    width,
    hidden_stride,
    weight_stride,
    DESCRIPTORS: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """float32 `h W^T` of one tile."""
    sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for step in range(tl.cdiv(width, BLOCK_WIDTH)):
        k = step * BLOCK_WIDTH
        h = load_tile(
            hidden, first_row, num_rows, k, width, hidden_stride, DESCRIPTORS, EVEN_WIDTH, BLOCK_ROWS, BLOCK_WIDTH
        )
        w = load_tile(
            weight,
            first_column,
            num_columns,
            k,
            width,
            weight_stride,
            DESCRIPTORS,
            EVEN_WIDTH,
            BLOCK_COLUMNS,
            BLOCK_WIDTH,
        )
        sums = tl.dot(h, w.T, sums, input_precision=PRECISION)
    return sums
