"""End of a data-parallel run."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed

from unisd.run.failures import is_first_to_fail


@contextmanager
def ending_process_group() -> Iterator[None]:
    """Destroy the process group, if there is one by then, on the way out, by an exception too.

    Its threads would else live until the interpreter's exit. One that still drops the tensors of a finished collective
    needs the interpreter then, and ends the process with SIGABRT ("terminate called without an active exception"): the
    launcher takes a good run for a failed one.

    The threads end with the last reference to the group, and the owner of that reference decides how: a trainer's DDP
    wrapper waits for them without letting go of the interpreter, for ever if a thread needs it. So everything that
    holds the group is collected first, and the last reference is the one here, which lets go.
    """
    try:
        yield
    except BaseException as error:
        is_first_to_fail()
        if _has_process_group():
            traceback.clear_frames(error.__traceback__)  # the trainer is a local variable of one of them
        raise
    finally:
        if _has_process_group():
            group = distributed.group.WORLD
            gc.collect()  # the wrapper is part of cycles
            distributed.destroy_process_group()
            del group


def _has_process_group() -> bool:
    return distributed.is_available() and distributed.is_initialized()
