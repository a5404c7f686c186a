"""Machine, versions, commit and command, to stand beside every figure."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.records import machine
from bench.records.products import products
from unisd_kernels.backends import extension
from unisd_kernels.processor import processor_name

# What a figure depends on; results and pages may change while they are made.
CODE = ("unisd_kernels", "unisd", "csrc", "bench/*.py")
PACKAGES = (
    "torch",
    "triton",
    "trl",
    "transformers",
    "liger-kernel",
    "cut-cross-entropy",
    "orda-kernel",
    "unisd-kernels",
)


def chosen_device(name: str) -> torch.device:
    """The device that `--device` means: "auto" is CUDA where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions, libraries and the command that this process runs."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    # A copy of the tree, without its history or with an older one, can be told which commit it is.
    commit = os.environ.get("UNISD_COMMIT")
    if commit is None:
        commit = _output_of("git", "rev-parse", "--short", "HEAD")
        if _output_of("git", "status", "--porcelain", "--", *CODE):
            commit = f"{commit} with changes"
    return {
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": processor_name(),
        "processor": machine.processor(),
        "products": products() if device.type == "cpu" else None,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "library": extension.cpu_isa() if extension.cpu_unavailable() is None else None,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "driver": _gpu("driver_version") if device.type == "cuda" else None,
        "gpu": _gpu("memory.total,power.limit,clocks.max.sm,clocks.max.memory") if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "command": command_line(sys.argv),
    }


def command_line(argv: Sequence[str]) -> str:
    """A process's arguments as they are typed in a shell: `python -m bench ...`, `unisd bench ...`, `pytest ...`."""
    program, *arguments = argv
    path = Path(program)
    typed = f"python -m {path.parent.name}" if path.name == "__main__.py" else path.name
    return " ".join([typed, *map(shlex.quote, arguments)])


def _gpu(fields: str) -> str | None:
    return _output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")


def _output_of(*command: str) -> str | None:
    """Standard output of a command; None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None
