"""Launches of kernels, past Triton's own way to them where it was gone before.

Triton binds and specializes every argument at each launch, makes text of it to look the kernel up, and compares every
global the kernel reads with what it was: 25 to 40 microseconds of the host, where the launch itself takes four. What a
variant depends on is less than that. Of an address the dtype and whether 16 divides it, of a number that is specialized
its value, of a descriptor dtype and block, and all constants; what was compiled for these is kept, and launched as
Triton's documentation launches it (`compiled[grid](...)`).

That is what Triton specializes on for NVIDIA's GPUs; `tests/triton/dry_launches.py` compares each launch's choice with
Triton's own. Others it asks for more (AMD's, how large a buffer is): there, and under the interpreter, every launch
goes Triton's way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# Of every launch. Triton 3.10 stops fusing a product and a sum of its own accord (3.9 warns of it), of which the
# kernels' epilogues are made.
OPTIONS = {"enable_fp_fusion": True}


class _Variant(NamedTuple):
    compiled: Any
    constants: tuple[Any, ...]  # in the order of the kernel's parameters


class _Kernel(NamedTuple):
    kernel: Any  # kept, so that its identity remains its own
    specialized: tuple[int, ...]  # places of the parameters that Triton specializes on, constants not among them
    variants: dict[tuple[Any, ...], _Variant]


# By their identity: a kernel's own hash is that of its source.
_kernels: dict[int, _Kernel] = {}


def launch_variant(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch `kernel[grid](*arguments, **constants)`: its constexpr parameters, which come last, and options by name.

    Args:
        arguments: tensors, tensor descriptors, numbers, None, and tuples of them; of a number that the kernel does not
            specialize on, one below 2^31.
    """
    if not isinstance(kernel, JITFunction):
        kernel[grid](*arguments, **constants)
        return
    known, key = variant_key(kernel, arguments, constants)
    variant = known.variants.get(key)
    if variant is not None:
        variant.compiled[grid if len(grid) == 3 else (*grid, 1, 1)](*arguments, *variant.constants)
        return
    compiled = kernel[grid](*arguments, **constants, **OPTIONS)
    if driver.active.get_current_target().backend == "cuda":
        names = kernel.arg_names[len(arguments) :]
        known.variants[key] = _Variant(compiled, tuple(constants[name] for name in names))


def variant_key(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[_Kernel, tuple[Any, ...]]:
    """A kernel's variants, and the key of the one for these arguments on the current device."""
    known = _kernels.get(id(kernel))
    if known is None:
        places = [p.num for p in kernel.params if not (p.is_constexpr or p.do_not_specialize)]
        known = _kernels[id(kernel)] = _Kernel(kernel, tuple(places), {})
    key = [driver.active.get_current_device(), *constants.values()]
    parts = [arguments[place] for place in known.specialized]
    for part in parts:
        kind = type(part)
        if kind is int or part is None:
            key.append(part)
        elif kind is float:
            key.append(float)
        elif kind is TensorDescriptor:
            key.append(part.base.dtype)
            key += part.block_shape
        elif isinstance(part, torch.Tensor):
            key.append(part.dtype)
            key.append(part.data_ptr() % 16 == 0)
        elif isinstance(part, tuple):
            parts += part  # which the loop then comes to
        else:
            raise TypeError(f"a kernel's argument must be a tensor, a number or None, got {kind.__name__}")
    return known, tuple(key)
