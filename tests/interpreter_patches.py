"""What Triton's interpreter does again at each operation of a kernel, done once: half of the time of its tests.
No value that a kernel computes is another one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any


def quicken_the_interpreter() -> None:
    from triton.runtime import interpreter

    _swap_once_a_launch(interpreter)
    _check_no_overflow(interpreter)
    _remember_types(interpreter)


@functools.cache
def _languages(function: Callable[..., Any], modules: tuple[Any, ...]) -> frozenset[int]:
    return frozenset(id(value) for value in function.__globals__.values() if any(value is each for each in modules))


def _swap_once_a_launch(interpreter: Any) -> None:
    """The functions of `triton.language` are swapped for the interpreter's once a launch. As it stands it looks through
    the modules again at each call of a device function, thousands of times a launch, and finds everything swapped."""
    swap = interpreter._patch_lang
    modules = (interpreter.tl, interpreter.tl.core)
    launch: Any = None  # the open launch's record of what it swapped; empty when the launch is over
    swapped: frozenset[int] = frozenset()

    def swap_what_is_new(function: Callable[..., Any]) -> Any:
        nonlocal launch, swapped
        wanted = _languages(function, modules)
        if launch is None or not launch._changes:
            launch, swapped = swap(function), wanted
            return launch
        if not wanted <= swapped:
            swap(function)
            swapped |= wanted
        return None  # a device function's caller never looks at it

    interpreter._patch_lang = swap_what_is_new


def _check_no_overflow(interpreter: Any) -> None:
    """Sums and products of integers are computed once. As it stands the interpreter computes them in 64 bits too, to
    compare, and drops the comparison: assertions on the device are for its debug mode, which is off."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _remember_types(interpreter: Any) -> None:
    """NumPy's dtype of a Triton type, and the parts of a block's type and of a tensor's shape, are made once a type."""
    language = interpreter.tl
    numpy_dtype = interpreter._get_np_dtype
    make_block, make_tensor = language.block_type.__init__, language.tensor.__init__
    dtypes: dict[str, Any] = {}
    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}
    shapes: dict[str, tuple[Any, Any]] = {}

    def dtype_of(kind: Any) -> Any:
        if kind.name not in dtypes:
            dtypes[kind.name] = numpy_dtype(kind)
        return dtypes[kind.name]

    def block(self: Any, element: Any, shape: Any) -> None:
        if type(element) is not language.dtype:  # a pointer's name does not say everything
            make_block(self, element, shape)
            return
        key = (element.name, *shape)
        if key not in blocks:
            make_block(self, element, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def tensor(self: Any, handle: Any, kind: Any) -> None:
        if kind.name not in shapes:
            make_tensor(self, handle, kind)
            shapes[kind.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.shape, self.numel = shapes[kind.name]

    interpreter._get_np_dtype = dtype_of
    language.block_type.__init__ = block
    language.tensor.__init__ = tensor
