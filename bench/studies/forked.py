"""A child that is forked to do one thing: it ends with it, and with its parent. Linux."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable

_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def forked(function: Callable[[], int]) -> int:
    """Process id of a child that does this and no more, its exit status, and ends where its parent does."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
        if os.getppid() == parent:
            status = function()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def print_to(output: int, errors: int) -> None:
    """Let this process, and what it starts, print to these open files. A handler that a logger was given before keeps
    its stream."""
    for name, number, file in (("stdout", 1, output), ("stderr", 2, errors)):
        os.dup2(file, number)
        setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", buffering=1, closefd=False))
