"""Highest memory use of this process so far."""

from __future__ import annotations

import math
import sys

import torch


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory use so far in GiB: of CUDA's allocator on that device, else the process's resident set (NaN on
    Windows, which does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return math.nan
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes on macOS, KiB elsewhere
