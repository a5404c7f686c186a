"""Triton's interpreter, which swaps the functions of `triton.language` for its own, does so once a launch.

As it stands it looks through the modules again at each call of a device function, thousands of times a launch, and
finds everything swapped: a third of the time of the kernels' tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


@functools.cache
def _languages(function: Callable[..., Any], modules: tuple[Any, ...]) -> frozenset[int]:
    return frozenset(id(value) for value in function.__globals__.values() if any(value is each for each in modules))


def swap_once_a_launch() -> None:
    from triton.runtime import interpreter

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
