"""`unisd bench`: the benchmarks of the repository, as `python -m bench` runs them there, from any directory.

They are not part of the wheel: the folder `bench` is looked for beside the package, where a clone has it.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import unisd

ROOT = Path(unisd.__file__).resolve().parents[1]
# Another project's folder of that name has not all of them.
_FILES = ("__init__.py", "__main__.py", "peers/unisd.py")


def main(arguments: list[str]) -> int:
    """Exit status 2: the benchmarks, or a package that they need, are not there."""
    folder = ROOT / "bench"
    if not all((folder / name).is_file() for name in _FILES):
        return _fail(
            f"there are no benchmarks in {ROOT}: they are in the repository, not in the wheel. "
            'Clone it, run `pip install -e ".[bench,peers]"` in it, then `unisd bench` again'
        )
    imported = sys.modules.get("bench")
    if imported is None:
        sys.path.insert(0, str(ROOT))
        imported = importlib.import_module("bench")
    if _folder_of(imported) != folder:
        return _fail(
            f"another module named bench is imported, from {_folder_of(imported)}; that of this package is {folder}. "
            "Run it in a process that does not import the other"
        )
    try:
        return importlib.import_module("bench.__main__").main(arguments)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("bench", "unisd", "unisd_kernels"):
            raise
        return _fail(
            f'{error.name} is not installed: run `pip install ".[bench,peers]"` in {ROOT}; the cases on SmolLM2\'s '
            "hidden states and TRL's kernels also need the extra `train`"
        )


def _folder_of(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve().parent if file else None


def _fail(reason: str) -> int:
    print(f"unisd bench: {reason}.", file=sys.stderr)
    return 2
