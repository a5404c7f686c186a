"""End of a data-parallel run."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed


@contextmanager
def ending_process_group() -> Iterator[None]:
    """Destroy the process group, if there is one by then, on the way out, by an exception too.

    Its threads would else live until the interpreter's exit. One that still drops the tensors of a finished collective
    needs the interpreter then, and ends the process with SIGABRT ("terminate called without an active exception"): the
    launcher takes a good run for a failed one.
    """
    try:
        yield
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
            # The threads end with the last reference to the group, and a trainer (its DDP wrapper) holds one in cycles.
            gc.collect()
