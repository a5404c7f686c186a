"""The API reference from the docstrings: `make docs` writes build/api/index.html.

    python scripts/api.py [FOLDER]

What `unisd_kernels`, `unisd_kernels.reference` and `unisd` export, by pdoc; equations, shapes and errors stand there as
they do in the code.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pdoc

PACKAGES = ("unisd_kernels", "unisd")
ROOT = Path(__file__).parents[1]


def say_nothing_of_fields(module: object) -> None:
    """Python's own words on a named tuple's fields ("Alias for field number 0") hide that its class describes them."""
    for name in module.__all__:  # type: ignore[attr-defined]
        kind = getattr(module, name)
        for field in getattr(kind, "_fields", ()):
            getattr(kind, field).__doc__ = ""
            kind.__new__.__doc__ = ""


def main(folder: Path) -> None:
    for package in PACKAGES:
        say_nothing_of_fields(importlib.import_module(package))
    pdoc.render.configure(docformat="google", show_source=False, search=True)
    pdoc.pdoc(*PACKAGES, output_directory=folder)
    print(f"{folder / 'index.html'}: {', '.join(PACKAGES)}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "api")
