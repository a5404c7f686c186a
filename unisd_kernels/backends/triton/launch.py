"""What a launch needs to know about tensors and devices."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager

import torch
import triton
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

# Rows of the buffers are padded to whole vectors of this many elements.
ROW_PADDING = 64
# What a program of the elementwise kernels takes; of those that walk a whole row, at a time.
TILE_ROWS, TILE_COLUMNS = 4, 512
LONG_COLUMNS = 2048


def interpreting() -> bool:
    """Do kernels run on the CPU, under the interpreter?"""
    return bool(knobs.runtime.interpret)


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    if tensor.device.type == "xpu" and tensor.device.index != torch.xpu.current_device():
        return torch.xpu.device(tensor.device)
    return contextlib.nullcontext()


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90" and the like, "hip", "xpu", or "interpreter" for a CPU."""
    if device.type == "cpu":
        return "interpreter"
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def num_sms(device: torch.device) -> int:
    """How many programs of a large tile run at a time."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return 4


def supports_tma(matrix: torch.Tensor) -> bool:
    """Can TMA address this matrix? It wants contiguous rows that start at multiples of 16 bytes, one after
    the other: not on the same place, as where one row was expanded to several, and not closer than they are long."""
    size = matrix.element_size()
    return (
        min(matrix.shape) > 0
        and matrix.stride(1) == 1
        and matrix.shape[1] <= matrix.stride(0) < 2**40 // size
        and matrix.stride(0) * size % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def has_whole_vectors(matrix: torch.Tensor) -> bool:
    """Does Triton load the rows of this matrix by whole vectors? It knows of numbers whether 16 divides them."""
    return matrix.stride(1) == 1 and matrix.stride(0) % 16 == 0 and matrix.data_ptr() % 16 == 0


def descriptor(matrix: torch.Tensor, block: tuple[int, int]) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block))


def product_precision(matrix: torch.Tensor) -> str:
    """Of a float32 product: what PyTorch is set to. 16-bit operands are exact in the product either way."""
    if matrix.dtype != torch.float32 or matrix.device.type != "cuda":
        return "ieee"
    # Follows torch.set_float32_matmul_precision too, whose own getter raises once this setting was used, as by
    # transformers' TrainingArguments(tf32=True).
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@functools.cache
def vocab_splits(row_blocks: int, column_blocks: int, processors: int) -> int:
    """Into how many spans to cut the vocabulary so that the rows' blocks times spans fill the device.

    Minimizes the number of rounds times the blocks in a span; each round also pays about one block for starting.
    """
    best, least = 1, float("inf")
    for spans in range(1, min(column_blocks, 4 * processors) + 1):
        rounds = -(-row_blocks * spans // processors)
        cost = rounds * (-(-column_blocks // spans) + 1)
        if cost < least:
            best, least = spans, cost
    return best


def matrices_or_descriptors(
    wanted: bool, width: int, *matrices: tuple[torch.Tensor, int]
) -> tuple[list[torch.Tensor | TensorDescriptor], bool]:
    """Descriptors of all matrices, for tiles of the given rows and `width` columns, if they are wanted and all of the
    matrices can have one; else the matrices. Says which."""
    if wanted and all(supports_tma(matrix) for matrix, _ in matrices):
        return [descriptor(matrix, (rows, width)) for matrix, rows in matrices], True
    return [matrix for matrix, _ in matrices], False


def tile_grid(tile: torch.Tensor, rows: int, columns: int) -> tuple[int]:
    """Programs over a tile of logits, those of the same rows one after the other. Along one axis: the second one has
    65535 programs at most, which are few for rows."""
    return (triton.cdiv(tile.shape[1], columns) * triton.cdiv(tile.shape[0], rows),)
