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
    _call_directly(interpreter)
    _promote_once(interpreter)
    _broadcast_what_differs(interpreter, _make_constants_once(interpreter))


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
    of_blocks: dict[tuple[int, ...], Any] = {}
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
            # One object for a shape, by which `_broadcast_what_differs` knows it.
            self.shape = of_blocks.setdefault(tuple(self.shape), self.shape)
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


def _call_directly(interpreter: Any) -> None:
    """A function of the language is called once for each call of it: not by way of a wrapper that refuses callers
    outside of kernels, and of another that filters the arguments to name the interpreter."""
    core, semantic = interpreter.tl.core, interpreter.interpreter_semantic
    wrapper = core.builtin(lambda: None).__code__

    def patch(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = member.__wrapped__ if getattr(member, "__code__", None) is wrapper else member

        def call(*arguments: Any, _semantic: Any = None, **named: Any) -> Any:
            return function(*arguments, **named, _semantic=semantic)

        scope.set_attr(owner, name, call)

    interpreter._patch_attr = patch


def _promote_once(interpreter: Any) -> None:
    """The type of a result is found once for each pair of types, and a type is itself without a look at its name."""
    language, semantic = interpreter.tl, interpreter.interpreter_semantic
    equal, promote = language.dtype.__eq__, semantic.computation_type_impl
    promoted: dict[tuple[Any, ...], Any] = {}

    def is_equal(self: Any, other: Any) -> bool:
        if self is other:
            return True
        return self.name == other.name if type(other) is language.dtype else equal(self, other)

    def result_type(left: Any, left_is_scalar: bool, right: Any, right_is_scalar: bool, division: bool) -> Any:
        key = (left.name, left_is_scalar, right.name, right_is_scalar, division)
        if key not in promoted:
            promoted[key] = promote(left, left_is_scalar, right, right_is_scalar, division)
        return promoted[key]

    language.dtype.__eq__ = is_equal
    semantic.computation_type_impl = result_type


def _make_constants_once(interpreter: Any) -> dict[int, Any]:
    """A number in a kernel is one array, which nothing can write to. What holds them, by its identity."""
    semantic = interpreter.interpreter_semantic
    make = semantic.scalar_constant
    constants: dict[tuple[Any, ...], Any] = {}
    held: dict[int, Any] = {}

    def constant(value: Any, dtype: Any) -> Any:
        key = (type(value), value, dtype.name)
        if key not in constants:
            made = make(value, dtype)
            if value != value:  # a key that would never be found
                return made
            made.handle.data.flags.writeable = False
            constants[key] = held[id(made.handle)] = made.handle
        return semantic.tensor(constants[key], dtype)

    semantic.scalar_constant = constant
    return held


def _broadcast_what_differs(interpreter: Any, constants: dict[int, Any]) -> None:
    """Operands of one shape are left as they are at once, those of one rank by their numbers, and a constant fills a
    shape once. As it stands shapes are compared through three objects made for each."""
    language, semantic = interpreter.tl, interpreter.interpreter_semantic
    broadcast, builder, block_type = semantic.broadcast_impl_value, semantic.builder, language.block_type
    filled: dict[tuple[int, int], Any] = {}

    def fill(operand: Any, kind: Any) -> Any:
        key = (id(operand.handle), id(kind.shape))
        if key not in filled:
            splat = builder.create_splat(kind.to_ir(builder), operand.handle)
            splat.data.flags.writeable = False
            filled[key] = splat
        return semantic.tensor(filled[key], kind)

    def to_shape(operand: Any, shape: list[int]) -> Any:
        if operand.type.shape.values == shape:
            return operand
        handle = builder.create_broadcast(operand.handle, shape)
        return semantic.tensor(handle, block_type(operand.type.scalar, shape))

    def broadcast_pair(left: Any, right: Any) -> tuple[Any, Any]:
        one, other = left.type, right.type
        if type(one) is not block_type or type(other) is not block_type:
            if type(one) is block_type and id(right.handle) in constants and type(one.scalar) is language.dtype:
                return left, fill(right, one.with_element_ty(other))
            if type(other) is block_type and id(left.handle) in constants and type(other.scalar) is language.dtype:
                return fill(left, other.with_element_ty(one)), right
            return broadcast(left, right)
        if one.shape is other.shape:
            return left, right
        sizes, others = one.shape.values, other.shape.values
        if len(sizes) != len(others) or any(a != b and a != 1 != b for a, b in zip(sizes, others)):
            return broadcast(left, right)
        shape = [b if a == 1 else a for a, b in zip(sizes, others)]
        return to_shape(left, shape), to_shape(right, shape)

    semantic.broadcast_impl_value = broadcast_pair
