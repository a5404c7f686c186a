"""End of a data-parallel run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed


@contextmanager
def ending_process_group() -> Iterator[None]:
    """Destroy the process group, if there is one by then, on the way out, by an exception too.

    Its threads would else live until the interpreter's exit, where one that still runs ends the process with SIGABRT
    ("terminate called without an active exception"), and the launcher takes a good run for a failed one.
    """
    try:
        yield
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
