"""Versions and machine, to stand beside every score."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

_PACKAGES = ("unisd-kernels", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "triton")


def environment() -> dict[str, str]:
    """Versions and machine, as they are printed in a report."""
    facts = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    facts["system"] = platform.platform()
    facts["CPU"] = f"{_processor()}, {os.cpu_count()} logical cores, {torch.get_num_threads()} threads used"
    if torch.cuda.is_available():
        facts["GPU"] = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    else:
        facts["GPU"] = "none"
    return facts


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
