"""Mistakes of a user, told in one or two lines without a traceback; a fault of the program keeps its traceback.

Which of the two an exception is, is told by how it was raised: a `raise` statement of this package, or of a library
while a command is being set up, was written for the user to read. An exception that nobody raised on purpose (an index
out of range, a call with a wrong argument) is a fault, and so is what comes out of a library in the middle of training.
"""

from __future__ import annotations

import dis
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from unisd.run.failures import is_first_to_fail, is_lost_connection

# Longer messages of libraries are cut: the first sentences say what is wrong.
_MOST_CHARACTERS = 400
_USERS = (ValueError, TypeError, OSError, ImportError, NotImplementedError)
_PACKAGES = ("unisd", "unisd_kernels")


class CommandError(Exception):
    """A message for the user of a command."""


@contextmanager
def setting_up() -> Iterator[None]:
    """Let libraries too raise for the user, meanwhile: a model that does not exist, a file that cannot be read.

    Raises:
        CommandError: from such an error. Everything else passes unchanged.
    """
    try:
        yield
    except _USERS as error:
        if not _raised_on_purpose(error) and not _names_a_file(error):
            raise
        raise CommandError(_one_line(str(error))) from error


def run(command: str, function: Callable[[], int], *, traceback: bool) -> int:
    """Exit status of `function()`: 2, and a message on stderr, where it raised because of what the user gave.

    Args:
        command: name to put before the message, for example "unisd train".
        traceback: let every exception through instead.
    """
    try:
        return function()
    except KeyboardInterrupt:
        if traceback:
            raise
        if is_first_to_fail():
            print(f"\n{command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if traceback:
            raise
        if not is_first_to_fail():
            return 1  # another process of the run has told
        if is_lost_connection(error):
            print(
                f"{command}: error: another process of this run is gone, so it cannot go on; what was saved is whole: "
                "go on with --resume",
                file=sys.stderr,
            )
            return 1
        if not (isinstance(error, CommandError) or _is_ours(error)):
            raise
        print(f"{command}: error: {_one_line(str(error))}", file=sys.stderr)
        if error.__cause__ is not None and not _is_ours(error.__cause__):
            print("(--traceback shows where it comes from)", file=sys.stderr)
        return 2


def wants_traceback(arguments: list[str]) -> tuple[bool, list[str]]:
    """Whether `--traceback` or UNISD_TRACEBACK=1 asks for a traceback, and the arguments without the flag."""
    asked = "--traceback" in arguments or os.environ.get("UNISD_TRACEBACK", "0") not in ("", "0")
    return asked, [argument for argument in arguments if argument != "--traceback"]


def _is_ours(error: BaseException) -> bool:
    """Whether the error was raised on purpose by this package."""
    if not isinstance(error, (*_USERS, RuntimeError)) or not _raised_on_purpose(error):
        return False
    module = _innermost(error).tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0] in _PACKAGES


def _raised_on_purpose(error: BaseException) -> bool:
    """Whether a `raise` statement made it, not an operation that failed."""
    innermost = _innermost(error)
    code = innermost.tb_frame.f_code.co_code
    return dis.opname[code[innermost.tb_lasti]] == "RAISE_VARARGS"


def _innermost(error: BaseException) -> TracebackType:
    innermost = error.__traceback__
    assert innermost is not None
    while innermost.tb_next is not None:
        innermost = innermost.tb_next
    return innermost


def _names_a_file(error: BaseException) -> bool:
    """Whether it is an error of the operating system on a file, for example one that is missing."""
    return isinstance(error, OSError) and error.filename is not None


def _one_line(message: str) -> str:
    line = re.sub(r"\s+", " ", message).strip()
    return line if len(line) <= _MOST_CHARACTERS else f"{line[: _MOST_CHARACTERS - 4].rstrip()} ..."
