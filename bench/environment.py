"""What stands beside every figure: machine, versions, commit, command."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from unisd_kernels import _lib


def environment(device: torch.device, command: str) -> dict[str, Any]:
    """Machine and versions, to stand beside every figure."""
    versions = {}
    for package in ("torch", "triton", "trl", "transformers", "unisd-kernels"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    commit = _output_of("git", "rev-parse", "--short", "HEAD")
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    return {
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
        "cpu": cpu,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "library": _lib.cpu_isa() if _lib.cpu_unavailable() is None else None,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device.type == "cuda"
        else None,
        "command": " ".join([command, *sys.argv[1:]]),
    }


def _output_of(*command: str) -> str | None:
    """Standard output of a command; None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None
