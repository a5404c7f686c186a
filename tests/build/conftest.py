"""Builds that the tests of all workers share."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Function of a name and a build: the folder that `build(folder)` filled, in the first worker that came."""
    root = tmp_path_factory.getbasetemp()
    # Each worker of pytest-xdist has a folder of its own in the run's.
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def once(name: str, build: Callable[[Path], None]) -> Path:
        folder, partial = root / name, root / f"{name}.{os.getpid()}"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                partial.mkdir()
                build(partial)
                partial.rename(folder)
        return folder

    return once
