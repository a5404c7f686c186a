"""A stand-in for an NVIDIA GPU: everything of a call up to the launch, on tensors that have shapes but no memory.

Triton's own path runs: the binder, its specialization on values and alignments, tensor descriptors, compilation down
to machine code. Only the launch is left out, and recorded. Must not run under the interpreter.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

import unisd_kernels.backends.triton
from bench.roofline.targets import SHARED_MEMORY
from unisd_kernels.backends.triton import launch, variants

# What a launch may ask for: programs along x, y and z; rows and columns of what TMA fetches at once.
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)
MOST_BOX = 256
PROCESSORS = {80: 108, 90: 132, 100: 148}


@dataclass(frozen=True)
class Launch:
    """One launch that did not happen."""

    kernel: str
    grid: tuple[int, int, int]
    stream: int
    arguments: tuple[Any, ...]


class LaunchFreeDriver(GPUDriver):
    """What Triton's runtime asks of a driver; its launches are recorded."""

    def __init__(self, capability: int, stream: int) -> None:  # not the base's, which asks torch for a GPU
        self.capability = capability
        self.stream = stream
        self.launches: list[Launch] = []
        properties = {
            "max_shared_mem": SHARED_MEMORY[f"sm_{capability}"],
            "multiprocessor_count": PROCESSORS[capability],
            "warpSize": 32,
            "max_num_regs": 65536,
        }
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            # Module, function, registers, spills, threads; the function is only handed on to the launcher.
            load_binary=lambda name, binary, shared, device: (object(), object(), 0, 0, 1024),
        )

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return divmod(self.capability, 10)

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs, so nothing can be timed")

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        names = source.fn.arg_names

        def record(x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
            arguments = rest[4:]  # behind two of metadata and two hooks
            assert len(arguments) == len(names)
            self.launches.append(Launch(source.fn.__name__, (x, y, z), stream, arguments))

        return record


class _Pretend(TorchFunctionMode):
    """Tensors "on CUDA" are torch's meta tensors, which have no memory, and say that they are on CUDA.

    Not torch's fake tensors: a PyTorch that was built without CUDA can neither slice nor differentiate those.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.backward:
            # Handed on to the engine itself, with this mode on in what it calls.
            with self:
                torch.autograd.graph._engine_run_backward(
                    args, (torch.ones_like(args[0]),), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
            return None
        if func == torch.Tensor.device.__get__ and args[0].is_meta:
            return torch.device("cuda", 0)
        if func == torch.Tensor.is_cuda.__get__:
            return args[0].is_meta
        if func is torch.Tensor.data_ptr and args[0].is_meta:
            return _address(args[0])
        if func in (torch.mm, torch.addmm) and kwargs.pop("out_dtype", None) is not None:
            # Only CUDA has it. The shapes are checked by the same product without it.
            out = kwargs.pop("out")
            assert func(*args, **kwargs).shape == out.shape
            return out
        if "device" in kwargs:
            kwargs["device"] = _without_memory(kwargs["device"])
        if func is torch.Tensor.to:
            args = tuple(_without_memory(value) if isinstance(value, (str, torch.device)) else value for value in args)
        return func(*args, **kwargs)


def _without_memory(device: Any) -> Any:
    return torch.device("meta") if device is not None and torch.device(device).type == "cuda" else device


def _address(tensor: torch.Tensor) -> int:
    """Address of a tensor without memory: its own for every storage, aligned as torch's allocator aligns."""
    if tensor.numel() == 0:
        return 0
    return tensor.untyped_storage()._cdata * 512 + tensor.storage_offset() * tensor.element_size()


def kernels() -> dict[str, Any]:
    """All that the package launches, by name."""
    found = {}
    for module in pkgutil.iter_modules(unisd_kernels.backends.triton.__path__):
        members = vars(importlib.import_module(f"unisd_kernels.backends.triton.{module.name}"))
        found.update({name: member for name, member in members.items() if name.endswith("_kernel")})
    return found


def compiled() -> list[tuple[str, Any]]:
    """Names and what Triton compiled of them in this process."""
    launched = {name: kernel.device_caches[0][0] for name, kernel in kernels().items() if 0 in kernel.device_caches}
    return [(name, built) for name, cache in launched.items() for built in cache.values()]


@contextmanager
def as_triton_would() -> Iterator[list[bool]]:
    """Inside, each launch must take the variant that Triton's own binder would; whether each was found without it."""
    launch_variant, found = variants.launch_variant, []

    def checked(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        known, key = variants.variant_key(kernel, arguments, constants)
        found.append(key in known.variants)
        launch_variant(kernel, grid, *arguments, **constants)
        # A warm-up launches nothing: what it gives is what it would have launched.
        theirs = kernel.run(*arguments, grid=grid, warmup=True, **constants, **variants.OPTIONS)
        assert known.variants[key].compiled is theirs, key

    with ExitStack() as stack:
        for module in pkgutil.iter_modules(unisd_kernels.backends.triton.__path__):
            loaded = importlib.import_module(f"unisd_kernels.backends.triton.{module.name}")
            if vars(loaded).get("launch_variant") is launch_variant:
                stack.enter_context(mock.patch.object(loaded, "launch_variant", checked))
        yield found


def _check(launch_: Launch) -> None:
    """What the CUDA driver and TMA would refuse."""
    assert all(0 <= programs <= most for programs, most in zip(launch_.grid, MOST_PROGRAMS)), launch_
    for argument in launch_.arguments:
        if isinstance(argument, TensorDescriptor):
            size = argument.base.element_size()
            assert all(0 < box <= MOST_BOX for box in argument.block_shape), argument
            assert argument.strides[-1] == 1, argument
            (row,) = argument.strides[:-1]
            assert row * size % 16 == 0, argument
            assert argument.shape[-1] <= row < 2**40 // size, argument


@contextmanager
def active(given: LaunchFreeDriver) -> Iterator[None]:
    """Inside, Triton's launches go to this driver."""
    before = driver._active
    driver.set_active(given)
    try:
        yield
    finally:
        driver._active = before


@contextmanager
def stand_in(capability: int = 90, stream: int = 0) -> Iterator[LaunchFreeDriver]:
    """Inside, tensors are made on "cuda" without memory, and Triton's launches go to `launches`. One capability a
    process: Triton keeps what it compiled."""
    given = LaunchFreeDriver(capability, stream)
    properties = SimpleNamespace(multi_processor_count=PROCESSORS[capability], name="a stand-in")
    with ExitStack() as stack:
        for target, name, value in (
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "get_device_capability", given.get_device_capability),
            (torch.cuda, "get_device_properties", lambda device: properties),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="User provided device_type of 'cuda'")
        for cached in (launch.architecture, launch.num_sms):
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        stack.enter_context(active(given))
        stack.enter_context(_Pretend())
        yield given
        for launch_ in given.launches:
            _check(launch_)
