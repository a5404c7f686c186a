"""Implementations by name: those that exist, those that can run here, the one an operation takes.

`impl=` on an operation beats the environment variable `UNISD_IMPL`, which beats the automatic choice. A named
implementation that cannot run raises; the automatic choice takes the first of the device's preferences that can.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from unisd_kernels.backends import extension
from unisd_kernels.backends.base import Backend


@dataclass(frozen=True)
class Implementation:
    """One way to compute the operations.

    Attributes:
        name: what `impl=` takes.
        description: one line.
        devices: device types it runs on; empty for every one.
        dtypes: of the operands; empty for every floating one.
        unavailable: returns why it cannot run in this environment, or None.
        backend: makes its backend; None for the dense reference.
    """

    name: str
    description: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    unavailable: Callable[[], str | None]
    backend: Callable[[], Backend] | None

    def reason_against(self, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
        """Reason why it cannot run on this device with operands of this dtype, or None if it can."""
        return self.does_not_apply(device, dtype) or self.unavailable()

    def does_not_apply(self, device: torch.device, dtype: torch.dtype | None) -> str | None:
        """Reason why it is not meant for such operands, or None; says nothing about the installation."""
        if self.devices and device.type not in self.devices:
            return f"runs on {', '.join(self.devices)}, not on {device.type}"
        if self.dtypes and dtype is not None and dtype not in self.dtypes:
            return f"takes {', '.join(map(str, self.dtypes))}, not {dtype}"
        return None


def _torch_backend() -> Backend:
    from unisd_kernels.backends.torch import TorchBackend

    return TorchBackend()


def _native_backend() -> Backend:
    from unisd_kernels.backends.native import NativeBackend

    return NativeBackend()


def _triton_backend(design: str | None) -> Backend:
    from unisd_kernels.backends.triton.backend import TritonBackend

    return TritonBackend(design)


@functools.cache
def _triton_unavailable() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}); install triton>=3.6"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 6):
        return f"triton {triton.__version__} is too old; install triton>=3.6"
    return None


# The CPU only under the interpreter, which is for checking: it is thousands of times slower.
_TRITON_DEVICES = ("cuda", "xpu", *(("cpu",) if os.environ.get("TRITON_INTERPRET") == "1" else ()))
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_IMPLEMENTATIONS: dict[str, Implementation] = {
    implementation.name: implementation
    for implementation in (
        Implementation(
            "native",
            "memory-bounded, compiled for the CPU",
            ("cpu",),
            (torch.float32, torch.bfloat16, torch.float16),
            extension.cpu_unavailable,
            _native_backend,
        ),
        *(
            Implementation(
                name,
                description,
                _TRITON_DEVICES,
                _TRITON_DTYPES,
                _triton_unavailable,
                functools.partial(_triton_backend, design),
            )
            for name, description, design in (
                ("triton", "memory-bounded, fused kernels for GPUs", None),
                ("triton_fused", "the same, with our product kernel for both KLs", "fused"),
                ("triton_chunked", "the same, with library products", "chunked"),
            )
        ),
        Implementation("torch", "memory-bounded, PyTorch operations on tiles", (), (), lambda: None, _torch_backend),
        Implementation("reference", "dense definitions; holds [N, V]; for checking", (), (), lambda: None, None),
    )
}
# Of the automatic choice, by device type. Under its interpreter Triton runs on a CPU too, but only when asked for by
# name.
_PREFERENCE = {"cpu": ("native", "torch")}
_PREFERENCE_ELSEWHERE = ("triton", "torch")


def _preference(device: torch.device) -> tuple[str, ...]:
    return _PREFERENCE.get(device.type, _PREFERENCE_ELSEWHERE)


def resolve(impl: str | None, device: torch.device, dtype: torch.dtype | None = None) -> Implementation:
    """The implementation an operation on `device` with operands of `dtype` takes. Where the automatic choice passes
    over a faster one because the installation lacks it, it warns once.

    Raises:
        ValueError: an unknown name (the message lists the known ones).
        RuntimeError: a known implementation that was asked for by name and cannot run; the message says why.
    """
    source = "impl"
    if impl is None:
        impl = os.environ.get("UNISD_IMPL") or None
        source = "UNISD_IMPL"
    if impl is not None:
        if not isinstance(impl, str) or impl not in _IMPLEMENTATIONS:
            raise ValueError(f"{source} must be one of {', '.join(map(repr, _IMPLEMENTATIONS))}, got {impl!r}")
        reason = _IMPLEMENTATIONS[impl].reason_against(device, dtype)
        if reason is not None:
            raise RuntimeError(f"{source}={impl!r} cannot be used on {device}: {reason}")
        return _IMPLEMENTATIONS[impl]
    for name in _preference(device):
        entry = _IMPLEMENTATIONS[name]
        if entry.does_not_apply(device, dtype) is not None:
            continue
        reason = entry.unavailable()
        if reason is None:
            return entry
        _warn_once(f"unisd_kernels: impl={name!r} ({entry.description}) is not used: {reason}")
    raise RuntimeError(f"no implementation can run on {device}:\n{explain(device)}")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def available(device: torch.device | str | None = None) -> dict[str, bool]:
    """Whether each implementation can run on `device` (default: CUDA if there is one, else the CPU)."""
    target = _device(device)
    return {name: entry.reason_against(target) is None for name, entry in _IMPLEMENTATIONS.items()}


def explain(device: torch.device | str | None = None) -> str:
    """Lines of text that say which implementation is taken on `device`, and for each of the others why not."""
    target = _device(device)
    forced = os.environ.get("UNISD_IMPL")
    chosen = next((name for name in _preference(target) if _IMPLEMENTATIONS[name].reason_against(target) is None), None)
    lines = [f"implementations on {target}" + (f" (UNISD_IMPL={forced})" if forced else "") + ":"]
    for name, entry in _IMPLEMENTATIONS.items():
        reason = entry.reason_against(target)
        if reason is not None:
            state = f"unavailable: {reason}"
        elif name == (forced or chosen):
            state = "used by default"
        else:
            state = f"available with impl={name!r}"
        lines.append(f"  {name:<15} {state} ({entry.description})")
    return "\n".join(lines)


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)
