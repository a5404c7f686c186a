"""Which library makes the floor's products on a CPU: asked of the libraries themselves, while they make a small one."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Callable

import torch

# As a library's verbose mode reports a product.
_MKL = re.compile(r"^MKL_VERBOSE (\w*GEMM\w*)\(", re.M)
_ONEDNN = re.compile(r"^onednn_verbose,.*?exec,cpu,(?:matmul|inner_product|gemm_api),([^,]*)", re.M)
# Built into torch where it has neither: OpenBLAS, AOCL-BLIS, Accelerate and others.
_BLAS = re.compile(r"BLAS_INFO=(\w+)")


def products() -> dict[str, str]:
    """The library by dtype, with the kernel it chose."""
    return {str(dtype).removeprefix("torch."): _library(dtype) for dtype in (torch.float32, torch.bfloat16)}


def _library(dtype: torch.dtype) -> str:
    hidden, weight = torch.ones(64, 128, dtype=dtype), torch.ones(256, 128, dtype=dtype)
    out = torch.empty(64, 256, dtype=dtype)
    said = _said_by_libraries(lambda: torch.mm(hidden, weight.T, out=out))
    if found := _ONEDNN.search(said):
        return f"oneDNN's {found[1]}"
    if found := _MKL.search(said):
        return f"MKL's {found[1].lower()}"
    built_with = _BLAS.search(torch.__config__.show())
    return f"neither MKL nor oneDNN (torch is built with {built_with[1] if built_with else 'no BLAS it names'})"


def _said_by_libraries(call: Callable[[], object]) -> str:
    """What the call makes MKL and oneDNN print; they write to the process's own standard output."""
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(1)
        try:
            flush(None)
            os.dup2(file.fileno(), 1)
            mkl, onednn = torch.backends.mkl, torch.backends.mkldnn
            with mkl.verbose(mkl.VERBOSE_ON), onednn.verbose(onednn.VERBOSE_ON):
                call()
            flush(None)
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        return file.read().decode(errors="replace")
