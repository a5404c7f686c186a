"""Facts about tensors and devices that a launch needs, and tuples of arguments for it."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from unisd_kernels.backends.transform import LogitTransform

if TYPE_CHECKING:
    from unisd_kernels.backends.triton.configs import GemmConfig

# Rows of the buffers are padded to whole vectors of this many elements.
ROW_PADDING = 64
# What a program of the elementwise kernels takes; of those that walk a whole row, at a time.
TILE_ROWS, TILE_COLUMNS = 4, 512
LONG_COLUMNS = 2048


def interpreting() -> bool:
    """Whether kernels run on the CPU, under the interpreter."""
    return bool(knobs.runtime.interpret)


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Context that makes the tensor's device the current one, on which Triton launches."""
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
    """Number of programs of a large tile that run at a time."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return 4


def supports_tma(matrix: torch.Tensor) -> bool:
    """Whether TMA can address this matrix. It wants contiguous rows that start at multiples of 16 bytes, one after the
    other: not on the same place, as where one row was expanded to several, and not closer than they are long."""
    rows, width = matrix.shape
    stride, step = matrix.stride()
    size = matrix.itemsize
    return (
        step == 1
        and stride * size % 16 == 0
        and rows > 0 < width <= stride < 2**40 // size
        and matrix.data_ptr() % 16 == 0
    )


def has_whole_vectors(matrix: torch.Tensor) -> bool:
    """Whether Triton loads the rows of this matrix by whole vectors: it knows of numbers whether 16 divides them."""
    return matrix.stride(1) == 1 and matrix.stride(0) % 16 == 0 and matrix.data_ptr() % 16 == 0


def descriptor(matrix: torch.Tensor, block: tuple[int, int]) -> TensorDescriptor:
    return TensorDescriptor(matrix, [*matrix.shape], [*matrix.stride()], [*block])


def product_precision(matrix: torch.Tensor) -> str:
    """Precision of a float32 product, which PyTorch is set to; 16-bit operands are exact in the product either way.

    On AMD's GPUs it is the full one: not all of them have another (MI350 has none).
    """
    if matrix.dtype != torch.float32 or matrix.device.type != "cuda" or torch.version.hip:
        return "ieee"
    # Follows torch.set_float32_matmul_precision too, whose own getter raises once this setting was used, as by
    # transformers' TrainingArguments(tf32=True).
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def gemm_operands(
    config: GemmConfig, rows: tuple[torch.Tensor, ...], columns: tuple[torch.Tensor, ...]
) -> tuple[list[torch.Tensor | TensorDescriptor], dict[str, Any]]:
    """The matrices of a product as its kernel takes them, and the constants that follow from them and from its tile:
    not to be changed, since the next call gets the same ones.

    Args:
        rows: hidden states, [N, H] each.
        columns: weights, [V, H] each.

    Tensor descriptors of all matrices, if the configuration wants them and all of the matrices can have one; else the
    matrices.
    """
    operands: list[torch.Tensor | TensorDescriptor] = [*rows, *columns]
    described = config.descriptors and all(map(supports_tma, (*rows, *columns)))
    even = all(matrix.shape[1] % config.width == 0 for matrix in rows)
    constants = _gemm_constants(config, described, even, product_precision(rows[0]))
    if described:
        operands = [descriptor(matrix, (config.rows, config.width)) for matrix in rows]
        operands += [descriptor(matrix, (config.columns, config.width)) for matrix in columns]
    return operands, constants


@functools.cache
def _gemm_constants(config: GemmConfig, described: bool, even_width: bool, precision: str) -> dict[str, Any]:
    return {
        "DESCRIPTORS": described,
        "EVEN_WIDTH": even_width,
        "PRECISION": precision,
        "WARP_SPECIALIZE": config.warp_specialize and described,
        "BLOCK_ROWS": config.rows,
        "BLOCK_COLUMNS": config.columns,
        "BLOCK_WIDTH": config.width,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def ceil_div(amount: int, step: int) -> int:
    """Not triton.cdiv, which is a function of the language too and takes the host ten microseconds for it."""
    return -(-amount // step)


def next_power_of_2(amount: int) -> int:
    """The next power of two, at least one. Not triton.next_power_of_2, for the same reason."""
    return 1 << (amount - 1).bit_length()


def tile_grid(tile: torch.Tensor, rows: int, columns: int) -> tuple[int]:
    """Programs over a tile of logits, those of the same rows one after the other. Along one axis: the second one has
    65535 programs at most, which are few for rows."""
    return (ceil_div(tile.shape[1], columns) * ceil_div(tile.shape[0], rows),)


class LogitTile(NamedTuple):
    """Logits of a block of rows in memory, as the kernels take them."""

    logits: torch.Tensor  # [rows, V]; not "values", which Triton's tuples have of their own
    stride: int
    tanh_scale: float | None  # of a soft cap that is not yet applied, or whose gradient is to be taken

    @classmethod
    def of(cls, logits: torch.Tensor, transform: LogitTransform) -> LogitTile:
        return cls(logits, logits.stride(0), transform.tanh_scale)
