"""Things of the code, as the tests hold them: functions, classes and objects that stay in the other process."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import Any, BinaryIO

from unisd.sandbox.inside import wire


class RemoteError(Exception):
    """An exception of a type that the code defined."""


class Channel:
    """Questions to the process of the code."""

    def __init__(self, reading: BinaryIO, writing: BinaryIO) -> None:
        self._reading, self._writing = reading, writing

    def ask(self, operation: str, *arguments: Any) -> Any:
        """The result of an operation there; its exception, as one of the same name, is raised here.

        Raises:
            wire.Ended: the process has ended.
        """
        wire.send(self._writing, wire.pack((operation, arguments), _number))
        answer = wire.unpack(wire.receive(self._reading), lambda number: Remote(self, number))
        if not isinstance(answer, tuple) or len(answer) != 3:
            raise wire.Ended("no answer")
        kind, value, changed = answer
        if kind == "raised":
            raise _exception(str(value))
        if operation == "call":
            _change(arguments[1], changed)
        return value


class Remote:
    """A reference to an object in the process of the code."""

    def __init__(self, channel: Channel, number: int) -> None:
        object.__setattr__(self, "_channel", channel)
        object.__setattr__(self, "_reference", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._channel.ask("call", self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._channel.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._channel.ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._channel.ask("getitem", self, key)

    def __len__(self) -> int:
        return int(self._channel.ask("len", self))

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._channel.ask("list", self)))

    def __bool__(self) -> bool:
        return bool(self._channel.ask("bool", self))

    def __str__(self) -> str:
        return str(self._channel.ask("str", self))

    def __repr__(self) -> str:
        return str(self._channel.ask("repr", self))

    def __eq__(self, other: object) -> bool:
        # What the code made may equal other things that it made; it does not decide about the tests' values.
        return isinstance(other, Remote) and bool(self._channel.ask("eq", self, other))

    def __hash__(self) -> int:
        return hash(self._reference)


def _number(value: Any) -> int:
    if isinstance(value, Remote):
        return int(object.__getattribute__(value, "_reference"))
    raise TypeError(f"a test hands over {type(value).__name__}, which cannot leave its process")


def _exception(name: str) -> BaseException:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind()
        except TypeError:  # a type that needs arguments
            pass
    return type(name, (RemoteError,), {})()


def _change(arguments: Any, changed: Any) -> None:
    """Change arguments in place as the call did."""
    for before, after in zip(arguments, changed, strict=False):
        if type(before) is not type(after):
            continue
        if isinstance(before, (list, bytearray)):
            before[:] = after
        elif isinstance(before, (dict, set)):
            before.clear()
            before.update(after)
