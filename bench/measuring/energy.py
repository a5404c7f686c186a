"""Joules of one step, from the device's own counter (NVML's total energy), where it has one."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

# The counter moves every tenth of a second or so; over this time its steps are a few percent.
SHORTEST_WINDOW = 1.0


class NoEnergy(RuntimeError):
    """The counter failed while it was read: nothing is claimed, and the timing stands."""


def energy_counter(device: torch.device) -> Callable[[], float] | None:
    """Reads joules since the driver was loaded; None where the device or the machine does not report them.

    What it returns raises `NoEnergy` where a later reading fails.
    """
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        identifier = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(identifier)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None

    def joules() -> float:
        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        except pynvml.NVMLError as error:
            raise NoEnergy(f"NVML: {error}") from error

    return joules


def joules_per_step(
    step: Callable[[], object],
    device: torch.device,
    counter: Callable[[], float] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float | None:
    """The step again and again for a second; None where no energy is reported: then none is claimed.

    Raises:
        NoEnergy: the counter was there and failed.
    """
    counter = counter or energy_counter(device)
    if counter is None:
        return None
    _synchronize(device)
    start, begin, count = clock(), counter(), 0
    while clock() - start < SHORTEST_WINDOW:
        step()
        count += 1
        _synchronize(device)
    return (counter() - begin) / count


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
