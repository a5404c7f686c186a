"""The multiply-adds that this processor's registers can do: the second floor, which no library's choices move.

A loop on registers alone (`fma_peak.cpp`), of float32 or of pairs of bfloat16, with the widest instructions there are,
on as many threads as torch uses. It is compiled on first use by the C++ compiler of the machine and kept in the user's
cache.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.records.failures import NotHere
from unisd_kernels.cache import cache_directory
from unisd_kernels.files import replacing

_SOURCE = Path(__file__).with_suffix(".cpp")
COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC", "-pthread")


@dataclass(frozen=True)
class Loop:
    """A loop of one instruction.

    Attributes:
        instruction: its name and registers.
    """

    instruction: str
    _number: int

    def run(self, flops: int, threads: int) -> None:
        """Do so many FLOPs."""
        _library().fma_run(self._number, ctypes.c_int64(flops), threads)


def loop(dtype: torch.dtype) -> Loop:
    """The fastest one for operands of a dtype.

    Raises:
        NotHere: another architecture, no compiler, or no such instructions.
    """
    library = _library()
    number = library.fma_loop(int(dtype == torch.bfloat16))
    if number < 0 or dtype not in (torch.float32, torch.bfloat16):
        raise NotHere(f"this processor has no wide multiply-adds of {str(dtype).removeprefix('torch.')}")
    return Loop(library.fma_name(number).decode(), number)


@functools.cache
def _library() -> ctypes.CDLL:
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        raise NotHere(f"the loop is written for x86-64 under Linux, this is {platform.machine()}, {platform.system()}")
    library = ctypes.CDLL(str(_compiled()))
    library.fma_name.restype = ctypes.c_char_p
    return library


def _compiled() -> Path:
    """The library in the user's cache, by its source and compiler."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [name for name in COMPILERS if shutil.which(name)][:1]
    if not compiler:
        raise NotHere(f"no C++ compiler for its loop: none of {', '.join(COMPILERS)} is there, and CXX is not set")
    digest = hashlib.sha256(_SOURCE.read_bytes() + " ".join((*compiler, *_FLAGS)).encode()).hexdigest()[:16]
    path = cache_directory() / "bench" / f"fma-peak-{digest}.so"
    if not path.exists():
        with replacing(path) as new:
            command = [*compiler, *_FLAGS, "-o", str(new), str(_SOURCE)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            except OSError as error:
                raise NotHere(f"CXX names no compiler: {error}") from None
            if done.returncode != 0:
                said = next((line for line in done.stderr.splitlines() if "error" in line), "it said nothing")
                raise NotHere(f"{compiler[0]} does not compile its loop: {said}")
    return path
