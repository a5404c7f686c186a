"""Loader of the compiled libraries, which keeps the reason where it cannot load one.

`_C.abi3.so` defines the operations `torch.ops.unisd.*` (csrc/ops.cpp) and implements them for the CPU;
`_C_cuda.abi3.so`, which few installations have, implements `ema_update_` for CUDA. Nothing is loaded before it is asked
for.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch

_DIRECTORY = Path(__file__).parents[1]
_CPU_LIBRARY = _DIRECTORY / "_C.abi3.so"
_CUDA_LIBRARY = _DIRECTORY / "_C_cuda.abi3.so"

# Every operation of csrc/ops.cpp. All of them write into arguments and return nothing, so that one fake
# implementation serves them all.
OPERATIONS = (
    "tile_softmax_",
    "tile_logprob_gradient_",
    "tile_divergence_",
    "tile_divergence_gradient_",
    "scale_rows",
    "linear_score",
    "int8_score",
    "linear_logits",
    "linear_backward",
    "linear_weight_gradient",
    "vector_math",
    "ema_update_",
)


def cpu_unavailable() -> str | None:
    """Reason why the CPU operations cannot be used, or None once they are loaded.

    Raises:
        ValueError: UNISD_CPU_ISA names an instruction set that this processor lacks.
    """
    return _load_cpu()[1]


def cpu_isa() -> str:
    """The instruction set the CPU operations run with: "amx_bf16", "avx512_bf16", "avx512_vnni", "avx512",
    "avx2", "neon" or "scalar". `UNISD_CPU_ISA` overrides the choice.

    Raises:
        RuntimeError: there is no library.
    """
    operations()
    return str(_load_cpu()[0])


def cpu_multiplies_bfloat16() -> bool:
    """Whether products take bfloat16 operands as they are; else they are widened to float32.

    Raises:
        RuntimeError: there is no library.
    """
    return cpu_isa().endswith("bf16")


def cpu_multiplies_int8() -> bool:
    """Whether there is an instruction for products of int8 codes; without one `int8_score` is slow.

    Raises:
        RuntimeError: there is no library.
    """
    return cpu_isa() == "avx512_vnni" or cpu_multiplies_bfloat16()


def operations() -> Any:
    """`torch.ops.unisd`, loaded.

    Raises:
        RuntimeError: the library is not there or does not load; the message says why.
    """
    reason = cpu_unavailable()
    if reason is not None:
        raise RuntimeError(f"no compiled CPU library: {reason}")
    return torch.ops.unisd


@functools.cache
def _load_cpu() -> tuple[str | None, str | None]:
    """(instruction set, None) or (None, reason)."""
    if not _CPU_LIBRARY.exists():
        return None, (
            "this installation was made without it (UNISD_BUILD=none, no C++ compiler, or torch was not there yet). "
            "With torch and a C++ compiler installed, run again: pip install --force-reinstall --no-deps ."
        )
    reason = _load(_CPU_LIBRARY)
    if reason is not None:
        return None, reason
    name = ctypes.CDLL(str(_CPU_LIBRARY)).unisd_cpu_isa
    name.restype = ctypes.c_char_p
    isa = name()
    if isa is None:
        raise ValueError(
            f"UNISD_CPU_ISA={os.environ.get('UNISD_CPU_ISA')!r} is not an instruction set of this processor; it takes "
            "scalar, avx2, avx512, avx512_vnni, avx512_bf16 or amx_bf16 on x86-64, scalar or neon on aarch64, or leave "
            "it unset"
        )
    for operation in OPERATIONS:
        torch.library.register_fake(f"unisd::{operation}", _fake)
    return isa.decode(), None


@functools.cache
def cuda_unavailable() -> str | None:
    """Reason why the ahead-of-time CUDA moving average cannot be used, or None once it is loaded."""
    reason = cpu_unavailable()
    if reason is not None:
        return f"the CPU library, which defines the operations, is not there: {reason}"
    if not _CUDA_LIBRARY.exists():
        return "this installation was made without it (build with UNISD_BUILD=cuda, which needs nvcc)"
    return _load(_CUDA_LIBRARY)


def _load(library: Path) -> str | None:
    try:
        torch.ops.load_library(library)
    except OSError as error:  # built for another torch or platform: the loader says which symbol or file it misses
        return f"{library.name} does not load with torch {torch.__version__}: {error}"
    return None


def _fake(*_: Any, **__: Any) -> None:
    """Results go to arguments: there is no shape to infer."""
