"""Rows of logits that fit the workspace, the buffers that hold them, and operands as kernels want them."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator

import torch


def row_stride(num_columns: int, padding: int) -> int:
    """Elements from one row to the next: at least `padding` are free behind each row, if any."""
    return (-(-num_columns // padding) + 1) * padding if padding else num_columns


def most_rows(workspace_bytes: int, row_bytes: int, num_columns: int) -> int:
    """Number of rows of `row_bytes` that fit the workspace.

    Raises:
        ValueError: not even one.
    """
    most = workspace_bytes // row_bytes
    if most < 1:
        raise ValueError(
            f"workspace_bytes={workspace_bytes} is too small: the logits of one row of {num_columns} columns take "
            f"{row_bytes} bytes. Give at least that, better 64 times as much"
        )
    return most


def rows_of(tensor: torch.Tensor, rows: slice) -> torch.Tensor:
    """`tensor[rows]`, which costs the host some microseconds, and is the tensor itself where these are all rows."""
    return tensor if rows.start == 0 and rows.stop == tensor.shape[0] else tensor[rows]


def row_buffer(rows: int, num_columns: int, padding: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[rows, num_columns], uninitialized, its rows padded."""
    buffer = torch.empty(rows, row_stride(num_columns, padding), dtype=dtype, device=device)
    advise_huge_pages(buffer)
    return buffer[:, :num_columns]


# Of the kernel: pages of 2 MiB for a range of memory, where it has them (Linux; <asm-generic/mman-common.h>).
_MADV_HUGEPAGE, _HUGE_PAGE = 14, 2 << 20


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function  # type: ignore[no-any-return]


def advise_huge_pages(buffer: torch.Tensor) -> None:
    """Ask for large pages under a CPU buffer. It is new memory at every call: to touch 57 MB of it for the first time
    takes 14,000 page faults or 28, and rows that lie 200 kB apart are 144 entries of the page table or a few.

    Advice: without it, or where it is not taken, everything is as right and a little slower. Another device's buffer is
    left alone.
    """
    if buffer.device.type != "cpu":
        return
    begin = -(-buffer.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    end = (buffer.data_ptr() + buffer.numel() * buffer.itemsize) // _HUGE_PAGE * _HUGE_PAGE
    madvise = _madvise()
    if madvise is not None and end > begin:
        madvise(begin, end - begin, _MADV_HUGEPAGE)


def equal_chunks(num_rows: int, most: int) -> int:
    """At most `most` rows a chunk, such that all chunks are about equally large."""
    return max(1, num_rows if num_rows <= most else -(-num_rows // -(-num_rows // most)))


# Rows of a chunk are a multiple of the tile of a GPU's matrix product where that many fit.
TILE_ROWS = 128


def whole_tiles(rows: int) -> int:
    """`rows`, down to a multiple of `TILE_ROWS` where there is one."""
    return rows // TILE_ROWS * TILE_ROWS or rows


def equal_tiles(num_rows: int, most: int) -> int:
    """At most `most` rows a chunk, whole tiles where that many fit, such that all chunks are about equally large."""
    rows = equal_chunks(num_rows, most)
    up = -(-rows // TILE_ROWS) * TILE_ROWS
    return up if rows < num_rows and up <= most else rows


def split_rows(num_rows: int, workspace_bytes: int, chunk_row_bytes: int, block_row_bytes: int) -> tuple[int, int]:
    """Rows of a chunk, whose gradient is held until one product, and of a block of it, whose logits are.

    Each product reads the weight once: for a block the two products of the logits, for a chunk the gradient's. So a
    chunk gets about twice the rows of a block, which has two views; and a block at least two tiles. `chunk_row_bytes`
    of 0: there is no gradient. The workspace holds at least one row of both.
    """
    block = whole_tiles(max(2 * TILE_ROWS, workspace_bytes // (2 * chunk_row_bytes + block_row_bytes)))
    block = min(block, whole_tiles(workspace_bytes // (chunk_row_bytes + block_row_bytes)))
    chunk = block
    if chunk_row_bytes:
        chunk = max(block, whole_tiles((workspace_bytes - block * block_row_bytes) // chunk_row_bytes))
    chunk = equal_tiles(num_rows, chunk)
    return chunk, min(block, chunk)


def row_major(matrix: torch.Tensor) -> torch.Tensor:
    """Kernels want contiguous rows, at any distance; a transposed or expanded matrix is copied."""
    if matrix.shape[1] > 1 and matrix.stride(1) != 1:
        return matrix.contiguous()
    return matrix


def contiguous(values: torch.Tensor | None) -> torch.Tensor | None:
    return None if values is None else values.contiguous()


def spans(total: int, step: int) -> Iterator[slice]:
    """Spans of at most `step`. Whole tiles are spread evenly: a last span of one tile would read the weight for it."""
    in_tiles = step > TILE_ROWS and step % TILE_ROWS == 0
    start = 0
    for left in range(-(-total // step), 0, -1):
        size = step
        if in_tiles:
            size = min(step, -(-(total - start) // (left * TILE_ROWS)) * TILE_ROWS)
        yield slice(start, min(start + size, total))
        start += size
