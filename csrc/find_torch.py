"""Find the torch whose headers and library setup.py builds against, without importing it."""

from __future__ import annotations

import importlib.util
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
OLDEST_TORCH = (2, 10)


def torch_directory() -> Path | None:
    """Folder of an installed torch that fits, found without importing it; None where there is none.

    Any torch >= 2.10 will do, also one of another Python: the library keeps to the stable ABI of 2.10, so that what is
    built is the same.
    """
    return next((folder for folder in torch_candidates() if torch_version(folder) >= OLDEST_TORCH), None)


def torch_candidates() -> Iterator[Path]:
    """Folders in which torch may lie, the likeliest first.

    Inside pip's isolation `sys.path` is cut down, but `sysconfig` still tells where the environment's packages are.
    Frontends that build in an environment of their own (`uv pip install`, `python -m build`) leave the user's in
    VIRTUAL_ENV, CONDA_PREFIX or on PATH, if it is activated; uv also takes a `.venv` beside the project, unactivated.
    """
    found = importlib.util.find_spec("torch")
    if found is not None:
        yield from map(Path, found.submodule_search_locations or ())
    for name in ("platlib", "purelib"):
        yield Path(sysconfig.get_path(name), "torch")
    yield Path(site.getusersitepackages(), "torch")
    prefixes = [Path(os.environ[name]) for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if os.environ.get(name)]
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        if (Path(folder).parent / "pyvenv.cfg").is_file():
            prefixes.append(Path(folder).parent)
    prefixes += [PROJECT / ".venv", Path(sys.base_prefix)]
    for prefix in prefixes:
        yield from sorted(prefix.glob("lib/python3*/site-packages/torch"))


def torch_version(directory: Path) -> tuple[int, int]:
    """(major, minor) of the torch in `directory`; (0, 0) if there is none, or none with headers."""
    file = directory / "version.py"
    if not file.is_file() or not (directory / "include" / "torch" / "csrc" / "stable").is_dir():
        return 0, 0
    number = re.search(r"^__version__ = ['\"](\d+)\.(\d+)", file.read_text(), re.MULTILINE)
    return (int(number[1]), int(number[2])) if number else (0, 0)
