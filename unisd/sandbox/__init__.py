"""Running a model's code against tests that it never sees.

program.py           what is run, and what came of it
run.py               `Sandbox`: bubblewrap, limits, many at a time
inside/tester.py     holds the tests
inside/candidate.py  holds the code, in a process of its own
inside/wire.py       what goes between the two
inside/remote.py     things of the code, as the tests hold them
inside/seccomp.py    the filter of system calls that refuses processes
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unisd.sandbox.program import Outcome, Program
    from unisd.sandbox.run import Sandbox

# Loaded when first used: the processes inside start a thousand times, and need neither.
_MODULES = {
    "Outcome": "unisd.sandbox.program",
    "Program": "unisd.sandbox.program",
    "Sandbox": "unisd.sandbox.run",
}

__all__ = ["Outcome", "Program", "Sandbox"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'unisd.sandbox' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
