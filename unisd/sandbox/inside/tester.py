"""The process of the tests: starts that of the code, runs the tests against it, says what came of them.

Reads a program as JSON from its standard input, writes `{"status": ..., "exception": ...}` to its standard output.
"""

from __future__ import annotations

import ast
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
from typing import Any

from unisd.sandbox.inside import wire
from unisd.sandbox.inside.remote import Channel

_PR_SET_DUMPABLE = 4
_OWN_BYTES = 256 << 20
_LONGEST_NAME = 200


def main(arguments: list[str]) -> None:
    """Run one program.

    Args:
        arguments: Python's command up to the candidate's own arguments, then these but for the descriptors, as JSON.
    """
    command, limits = json.loads(arguments[0])
    program = json.load(sys.stdin)
    # What the tests print is no outcome, and what the code answers shall not fill the memory here either.
    answer = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    resource.setrlimit(resource.RLIMIT_AS, (limits[1] + _OWN_BYTES, limits[1] + _OWN_BYTES))
    # The code may not look into this process, which is its own user's.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    process, channel = _start(command, limits)
    try:
        _run(program, channel)
        status, exception = "passed", ""
    except wire.Ended:
        process.kill()
        spent = process.wait() == -signal.SIGXCPU
        status, exception = ("timed out" if spent else "crashed"), ""
    except BaseException as error:
        status, exception = ("failed" if isinstance(error, AssertionError) else "crashed"), type(error).__name__
    process.kill()
    os.write(answer, json.dumps({"status": status, "exception": exception[:_LONGEST_NAME]}).encode())


def _start(command: list[str], limits: list[int]) -> tuple[subprocess.Popen[bytes], Channel]:
    to_read, to_answer = os.pipe()
    to_ask, to_write = os.pipe()
    process = subprocess.Popen(
        [*command, *map(str, [to_ask, to_answer, *limits])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(to_ask, to_answer),
    )
    os.close(to_ask)
    os.close(to_answer)
    return process, Channel(os.fdopen(to_read, "rb"), os.fdopen(to_write, "wb"))


def _run(program: dict[str, Any], channel: Channel) -> None:
    names = channel.ask("load", _imports(program["setup"]), program["code"])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise wire.Ended("no names")
    space: dict[str, Any] = {"__name__": "tests"}
    space |= {name: channel.ask("name", name) for name in names if _needed(name, program)}
    exec(compile(program["setup"], "<setup>", "exec"), space)
    for test in program["tests"]:
        exec(compile(test, "<test>", "exec"), space)


def _needed(name: str, program: dict[str, Any]) -> bool:
    return any(name in text for text in (program["setup"], *program["tests"]))


def _imports(setup: str) -> str:
    """The imports of the setup, which the code may count on."""
    found = [node for node in ast.parse(setup).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return "\n".join(map(ast.unparse, found))
