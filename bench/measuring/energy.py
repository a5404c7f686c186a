"""Joules of one step, from the device's own counter (`unisd.energy`), where it has one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from unisd.energy import EnergyMeter

# The counter moves every tenth of a second or so; over this time its steps are a few percent.
SHORTEST_WINDOW = 1.0


class NoEnergy(RuntimeError):
    """The counter failed while it was read: nothing is claimed, and the timing stands."""


def energy_counter(device: torch.device, nvml: Any = None) -> Callable[[], float] | None:
    """Reads joules of a card from now on, by its counter; None where it has none that can be read.

    What it returns raises `NoEnergy` where a later reading fails.

    Args:
        nvml: NVML's library; None to load the driver's.
    """
    if device.type != "cuda":
        return None
    meter = EnergyMeter(device, nvml=nvml)
    if not meter.read().parts[0].measured:
        return None

    def joules() -> float:
        card = meter.read().parts[0]
        if card.joules is None:
            raise NoEnergy(card.how)
        return card.joules

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
