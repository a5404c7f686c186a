"""Extra peak memory of one step: what it adds to what was held before it."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no field {field}")


def extra_peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Run `step` once and return how far memory rose above its level before.

    CUDA: torch's own counter. CPU on Linux: the high-water mark of the resident set, reset before the step. It
    includes the scratch space of the matrix library, so call it in a fresh process whose matrix library is warm.
    Elsewhere: `ru_maxrss`, which cannot be reset, so the result is a lower bound.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if _STATUS.exists():
        _CLEAR.write_text("5")  # resets VmHWM
        before = _status_bytes("VmRSS")
        step()
        return max(0, _status_bytes("VmHWM") - before)
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before
