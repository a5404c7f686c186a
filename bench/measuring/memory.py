"""Extra peak memory of one step: what it adds to what was held before it."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no field {field}")


def run_with_peak(step: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """Run `step` once; what it returned, and how far memory rose above its level before.

    CUDA: torch's own counter. CPU on Linux: the high-water mark of the process's resident set, reset before the step
    and after freed memory has gone back to the system. It includes the scratch space of the matrix library, unless a
    product ran before. Elsewhere: `ru_maxrss`, which cannot be reset, so the result is a lower bound.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = step()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    if _STATUS.exists():
        _give_back_freed_memory()
        _CLEAR.write_text("5")  # resets VmHWM
        before = _status_bytes("VmRSS")
        result = step()
        return result, max(0, _status_bytes("VmHWM") - before)
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    result = step()
    return result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before


def extra_peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The second of `run_with_peak`."""
    return run_with_peak(step, device)[1]


@contextmanager
def settled_garbage() -> Iterator[None]:
    """Within it a collection walks only what was made since: all that a process has imported takes up to a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _give_back_freed_memory() -> None:
    """Else the step could use pages that were freed but are still counted, and would seem to need less."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)
