"""The process of the code: runs it, then does what the tests ask, until they are done.

    python -I -c "..." READING WRITING SECONDS MEMORY FILE THREADS

Two file descriptors, CPU seconds, bytes of address space and of a file, threads (-1 without bubblewrap: any number).
Python itself refuses the network, other processes and files outside the folder; bubblewrap, where it is around this,
does so for code that gets past Python.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from typing import Any

from unisd.sandbox.inside import wire

_REFUSED = ("socket.", "subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.kill")
_CHANGING = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
)


def main(arguments: list[str]) -> None:
    """Serve until the tests' process ends."""
    reading, writing, seconds, memory, size, threads = map(int, arguments)
    if threads >= 0:
        from unisd.sandbox.inside.seccomp import refuse_processes  # whose ctypes takes time to load

        refuse_processes()
    _limit(seconds, memory, size, threads)
    source, sink = os.fdopen(reading, "rb"), os.fdopen(writing, "wb")
    objects: list[Any] = []
    numbers: dict[int, int] = {}

    def refer(value: Any) -> int:
        if id(value) not in numbers:
            numbers[id(value)] = len(objects)
            objects.append(value)
        return numbers[id(value)]

    space: dict[str, Any] = {"__name__": "candidate", "__builtins__": __builtins__}
    operations = _operations(space)
    # Looked up before the code runs, which may replace them.
    pack, unpack, send, receive, ended = wire.pack, wire.unpack, wire.send, wire.receive, wire.Ended
    _guard(os.getcwd())
    while True:
        try:
            operation, values = unpack(receive(source), objects.__getitem__)
        except ended:
            os._exit(0)
        changed: tuple[Any, ...] = ()
        try:
            result = operations[operation](*values)
            if operation == "call":
                changed = tuple(values[1])
            message = pack(("value", result, changed), refer)
        except BaseException as error:
            message = pack(("raised", type(error).__name__, ()), refer)
        send(sink, message)


def _operations(space: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    def load(*parts: str) -> list[str]:
        for part in parts:
            exec(compile(part, "<code>", "exec"), space)
        return [name for name in space if not name.startswith("__")]

    return {
        "load": load,
        "name": lambda name: space[name],
        "call": lambda function, args, kwargs: function(*args, **kwargs),
        "getattr": getattr,
        "setattr": setattr,
        "getitem": lambda value, key: value[key],
        "len": len,
        "list": list,
        "bool": bool,
        "str": str,
        "repr": repr,
        "eq": lambda one, other: bool(one == other),
    }


def _limit(seconds: int, memory: int, size: int, threads: int) -> None:
    wanted = {"CPU": seconds, "AS": memory, "FSIZE": size, "NOFILE": 64, "CORE": 0}
    if threads >= 0:
        wanted["NPROC"] = threads
    for name, limit in wanted.items():
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(which, (limit, limit))


def _guard(folder: str) -> None:
    """Refuse, from here on, the network, other processes, and changes of files outside the folder."""
    separator = "/"
    inside = os.path.realpath(folder) + separator
    real, text = os.path.realpath, os.fsdecode

    def named(path: Any) -> bool:
        return isinstance(path, (str, bytes))

    def outside(path: Any) -> bool:
        return not named(path) or not (text(real(path)) + separator).startswith(inside)

    def hook(event: str, values: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = values
            writes = bool(set(mode) & set("wax+")) if isinstance(mode, str) else False
            writes = writes or bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            if writes and outside(path):
                raise PermissionError("the sandbox has no file to write there")
        elif event.startswith(_REFUSED) or event == "ctypes.dlopen":
            raise PermissionError("the sandbox does not allow it")
        elif event.startswith(_CHANGING) and any(
            outside(path) for path in values[:2] if isinstance(path, (str, bytes))
        ):
            raise PermissionError("the sandbox has no file to change there")

    sys.addaudithook(hook)
