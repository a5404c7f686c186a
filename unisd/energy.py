"""Energy that a run takes: measured where the device reports it, else an estimate that says how it is made.

    GPU        NVML's counter of the card; without one the card's power limit x time, which is a bound
    processor  Linux's RAPL counters of all packages; where none can be read, CPU time of this process x 8 W

A counter of RAPL counts the whole package, other processes included. The 8 watts are an assumption: the thermal design
power of today's processors divided by their threads is 2 to 8 W.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

FILE_NAME = "energy.json"
"""In the folder of a run: what it took and how that is known."""
NAME = "unisd/energy_joules"
"""Name in the logs: since the beginning of the run."""
WATTS_A_CORE = 8.0
_POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Part:
    """Energy of one device.

    Attributes:
        device: "processor", or the GPU's name.
        joules: since the meter was made; None where nothing tells.
        measured: by a counter, rather than estimated.
        how: in words.
    """

    device: str
    joules: float | None
    measured: bool
    how: str


@dataclass(frozen=True)
class Energy:
    """Energy of a machine since some moment; see `Part`."""

    parts: tuple[Part, ...]

    @property
    def joules(self) -> float:
        """Sum over the devices that are known."""
        return sum(part.joules for part in self.parts if part.joules is not None)

    @property
    def measured(self) -> bool:
        """Whether all of it is."""
        return all(part.measured for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"joules": self.joules, "measured": self.measured, "parts": [vars(part) for part in self.parts]}


class _Source(Protocol):
    def read(self) -> Part: ...


class EnergyMeter:
    """Energy from now on, of this process's device and of the processor.

    Args:
        device: where the run computes.
        powercap: folder of Linux's counters; None for the system's.
        nvml: NVML's library; None to load the driver's.
    """

    def __init__(self, device: torch.device, *, powercap: Path | None = None, nvml: Any = None) -> None:
        self._sources: list[_Source] = []
        if device.type != "cpu":
            self._sources.append(_gpu(device, nvml))
        zones = _readable_zones(powercap or _POWERCAP)
        self._sources.append(_Rapl(zones) if zones else _CoreTime())

    def read(self) -> Energy:
        """So far. RAPL's counters wrap after some minutes to hours: read often."""
        return Energy(tuple(source.read() for source in self._sources))


class _Rapl:
    def __init__(self, zones: list[Path]) -> None:
        self._zones = zones
        self._last = [_microjoules(zone) for zone in zones]
        self._ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
        self._sum = 0

    def read(self) -> Part:
        for place, zone in enumerate(self._zones):
            now = _microjoules(zone)
            # Once around since the last time: more often cannot be told.
            self._sum += now - self._last[place] + (self._ranges[place] if now < self._last[place] else 0)
            self._last[place] = now
        packages = f"{len(self._zones)} package{'s' if len(self._zones) > 1 else ''}"
        return Part("processor", self._sum / 1e6, True, f"RAPL, {packages}, other processes included")


class _CoreTime:
    def __init__(self) -> None:
        self._begun = time.process_time()

    def read(self) -> Part:
        seconds = time.process_time() - self._begun
        how = (
            f"no RAPL counter can be read: CPU time of this process ({seconds:.0f} s over all cores) x "
            f"{WATTS_A_CORE:g} W, an assumption (design power over threads is 2 to 8 W)"
        )
        return Part("processor", seconds * WATTS_A_CORE, False, how)


class _Counter:
    """A counter that only rises."""

    def __init__(self, device: str, joules: Callable[[], float], how: str) -> None:
        self._device, self._joules, self._how = device, joules, how
        self._begun = joules()

    def read(self) -> Part:
        try:
            return Part(self._device, self._joules() - self._begun, True, self._how)
        except _NvmlError as error:
            return Part(self._device, None, False, f"not known: NVML's counter of the card failed ({error})")


class _Bound:
    """A power limit, for as long as it takes."""

    def __init__(self, device: str, watts: float) -> None:
        self._device, self._watts, self._begun = device, watts, time.perf_counter()

    def read(self) -> Part:
        seconds = time.perf_counter() - self._begun
        how = f"NVML has no counter of this card: its power limit, {self._watts:g} W, x {seconds:.0f} s, a bound"
        return Part(self._device, seconds * self._watts, False, how)


class _Unknown:
    def __init__(self, device: str, why: str) -> None:
        self._part = Part(device, None, False, f"not known: {why}")

    def read(self) -> Part:
        return self._part


def _gpu(device: torch.device, nvml: Any) -> _Source:
    if device.type != "cuda" or torch.version.hip:
        return _Unknown(device.type, "no counter of this kind of device is read")
    properties = torch.cuda.get_device_properties(device)
    name = properties.name
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1") if nvml is None else nvml
    except OSError as error:
        return _Unknown(name, f"NVML cannot be loaded ({error})")
    if code := library.nvmlInit_v2():
        return _Unknown(name, f"NVML does not start (error {code})")
    handle = ctypes.c_void_p()
    # By its UUID: CUDA_VISIBLE_DEVICES numbers the cards otherwise than NVML does.
    uuid = f"GPU-{getattr(properties, 'uuid', '')}".encode()
    if code := library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
        return _Unknown(name, f"NVML does not know the card (error {code})")

    def joules() -> float:
        total = ctypes.c_ulonglong()
        code = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(total))
        if code:
            raise _NvmlError(f"error {code}")
        return total.value / 1e3

    try:
        return _Counter(name, joules, "NVML's counter of the card, other processes included")
    except _NvmlError:
        limit = ctypes.c_uint()
        if code := library.nvmlDeviceGetEnforcedPowerLimit(handle, ctypes.byref(limit)):
            return _Unknown(name, f"NVML has neither a counter nor a power limit of it (error {code})")
        return _Bound(name, limit.value / 1e3)


class _NvmlError(RuntimeError):
    """A reading of NVML's counter that failed."""


def _readable_zones(powercap: Path) -> list[Path]:
    """Counters of whole packages; those of their parts are contained in them."""
    zones = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        if zone.name.count(":") == 1 and _text(zone / "name").startswith("package") and _text(zone / "energy_uj"):
            zones.append(zone)
    return zones


def _microjoules(zone: Path) -> int:
    return int((zone / "energy_uj").read_text())


def _text(file: Path) -> str:
    """A file's text; "" for one that is not there or, as the counters are for who is not root, not readable."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
