"""Versions and machine, to stand beside every score."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from unisd_kernels.processor import processor_name

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
    facts["CPU"] = f"{processor_name()}, {os.cpu_count()} logical cores, {torch.get_num_threads()} threads used"
    if torch.cuda.is_available():
        facts["GPU"] = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    else:
        facts["GPU"] = "none"
    return facts
