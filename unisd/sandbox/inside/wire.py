"""Messages between the process of the tests and that of the code.

What comes from the code is data: plain values, rebuilt as exact built-in types, so that no method of the code decides
a comparison. Everything else stays where it is, and the tests hold a reference.
"""

from __future__ import annotations

import importlib
import io
import pickle
import struct
import sys
import types
from collections.abc import Callable
from typing import Any, BinaryIO

MOST_BYTES = 64 << 20
_LENGTH = struct.Struct("<I")

_BASES = (bool, int, float, complex, str, bytes, bytearray, tuple, list, set, frozenset, dict)
# By the names of their modules, which are loaded only where they are used.
_OTHERS = {
    "builtins": ("range", "slice"),
    "collections": ("Counter", "OrderedDict", "defaultdict", "deque"),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
}
_ITERATORS = ("builtins", "itertools")
_VIEWS = {type({}.keys()): "keys", type({}.values()): "values", type({}.items()): "items"}


class Ended(Exception):
    """The other process has ended, or does not keep to the form of messages."""


def send(stream: BinaryIO, message: bytes) -> None:
    """Write one message.

    Raises:
        Ended: one that is too long, or nobody to read it.
    """
    if len(message) > MOST_BYTES:
        raise Ended("a message is too long")
    try:
        stream.write(_LENGTH.pack(len(message)) + message)
        stream.flush()
    except (OSError, ValueError) as error:
        raise Ended(str(error)) from None


def receive(stream: BinaryIO) -> bytes:
    """Read one message.

    Raises:
        Ended: there is none.
    """
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise Ended("no message")
    (length,) = _LENGTH.unpack(head)
    if length > MOST_BYTES:
        raise Ended("a message is too long")
    body = stream.read(length)
    if len(body) < length:
        raise Ended("half a message")
    return body


class _Packer(pickle.Pickler):
    """Writes plain values as they are and everything else as a reference."""

    def __init__(self, stream: io.BytesIO, refer: Callable[[Any], int | None]) -> None:
        super().__init__(stream, protocol=4)
        self._refer = refer

    def persistent_id(self, value: Any) -> Any:
        kind = type(value)
        if _plain(kind) or (kind is type and _plain(value)):
            return None
        if kind in _VIEWS:
            return (_VIEWS[kind], list(value))
        if isinstance(value, types.GeneratorType) or (hasattr(kind, "__next__") and kind.__module__ in _ITERATORS):
            return ("iterator", list(value))
        if kind.__module__.partition(".")[0] == "numpy" and getattr(value, "ndim", None) == 0:
            return ("value", value.item())
        for base in _BASES:
            if isinstance(value, base):
                return ("value", _as(base, value))
        return ("reference", self._refer(value))


def _plain(kind: type) -> bool:
    if kind in _BASES or kind in (type(None), type(Ellipsis), type(NotImplemented)):
        return True
    names = _OTHERS.get(kind.__module__, ())
    return kind.__name__ in names and getattr(sys.modules[kind.__module__], kind.__name__, None) is kind


def _as(base: Any, value: Any) -> Any:
    """A value of a subclass as its built-in type, by that type's own methods."""
    if base in (tuple, list, set, frozenset):
        return base(base.__iter__(value))
    if base is dict:
        return dict(dict.items(value))
    if base in (int, float, complex):
        return base.__add__(value, base(0))
    return base.__getitem__(value, slice(None))


class _Unpacker(pickle.Unpickler):
    """Reads what `_Packer` wrote, and nothing else."""

    def __init__(self, stream: io.BytesIO, refer: Callable[[int], Any]) -> None:
        super().__init__(stream)
        self._refer = refer

    def find_class(self, module: str, name: str) -> Any:
        if name in _OTHERS.get(module, ()) or (module == "builtins" and name in {kind.__name__ for kind in _BASES}):
            return getattr(importlib.import_module(module), name)
        raise pickle.UnpicklingError(f"{module}.{name} is no plain value")

    def persistent_load(self, pid: Any) -> Any:
        kind, value = pid
        if kind == "reference":
            return self._refer(value)
        if kind == "iterator":
            return iter(list(value))
        if kind == "keys":
            return dict.fromkeys(value).keys()
        if kind == "values":
            return dict(enumerate(value)).values()
        if kind == "items":
            return dict(value).items()
        if kind == "value":
            return value
        raise pickle.UnpicklingError("an unknown kind of value")


def pack(value: Any, refer: Callable[[Any], int | None]) -> bytes:
    """Bytes of a value; `refer` gives the number of what is not plain."""
    stream = io.BytesIO()
    _Packer(stream, refer).dump(value)
    return stream.getvalue()


def unpack(message: bytes, refer: Callable[[int], Any]) -> Any:
    """The value of bytes; `refer` gives what a number stands for.

    Raises:
        Ended: anything but a message of `pack`.
    """
    try:
        return _Unpacker(io.BytesIO(message), refer).load()
    except Exception as error:  # whatever the code has written in place of a message
        raise Ended(f"no message: {type(error).__name__}") from None
