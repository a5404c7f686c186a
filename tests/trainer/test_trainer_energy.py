"""Energy: counters that wrap, cards that tell or do not, estimates that say so, and what a run records."""

import ctypes
import json
import time
from types import SimpleNamespace

import pytest
import torch

from bench.measuring import energy as measuring
from tests.trainer import tiny_run
from unisd import energy
from unisd.energy import EnergyMeter

CPU = torch.device("cpu")


def write_zone(folder, name, called, microjoules, largest=1000_000):
    (folder / name).mkdir(parents=True, exist_ok=True)
    for file, text in (("name", called), ("energy_uj", microjoules), ("max_energy_range_uj", largest)):
        (folder / name / file).write_text(f"{text}\n")


def test_counters_of_packages_are_summed_and_may_wrap(tmp_path):
    write_zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    write_zone(tmp_path, "intel-rapl:1", "package-1", 100_000)
    write_zone(tmp_path, "intel-rapl:0:0", "core", 5)
    write_zone(tmp_path, "intel-rapl:2", "psys", 5)
    meter = EnergyMeter(CPU, powercap=tmp_path)
    write_zone(tmp_path, "intel-rapl:0", "package-0", 50_000)
    write_zone(tmp_path, "intel-rapl:1", "package-1", 300_000)
    write_zone(tmp_path, "intel-rapl:0:0", "core", 700_000)
    write_zone(tmp_path, "intel-rapl:2", "psys", 700_000)
    assert meter.read().joules == pytest.approx(0.15 + 0.2)
    write_zone(tmp_path, "intel-rapl:1", "package-1", 0)
    found = meter.read()
    assert found.joules == pytest.approx(0.15 + 0.2 + 0.7)
    assert found.measured
    assert "RAPL, 2 packages" in found.parts[0].how


def test_without_a_counter_it_is_an_estimate_that_says_so(tmp_path):
    meter = EnergyMeter(CPU, powercap=tmp_path / "nothing")
    until = time.process_time() + 0.02
    while time.process_time() < until:
        pass
    found = meter.read()
    assert 0.02 * 8 <= found.joules < 2 * 8
    assert not found.measured
    assert "CPU time of this process" in found.parts[0].how
    assert "an assumption" in found.as_dict()["parts"][0]["how"]


class Nvml:
    """Stands for the driver's library."""

    def __init__(self, counter=0, limit=0, known=0):
        self.counter, self.limit, self.known, self.millijoules, self.asked = counter, limit, known, 5000, None

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        self.asked = uuid
        return self.known

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, total):
        ctypes.cast(total, ctypes.POINTER(ctypes.c_ulonglong))[0] = self.millijoules
        return self.counter

    def nvmlDeviceGetEnforcedPowerLimit(self, handle, limit):
        ctypes.cast(limit, ctypes.POINTER(ctypes.c_uint))[0] = 300_000
        return self.limit


@pytest.mark.parametrize(
    ("library", "measured", "how"),
    [
        (Nvml(), True, "NVML's counter of the card"),
        (Nvml(counter=3), False, "its power limit, 300 W, x 0 s, a bound"),
        (Nvml(counter=3, limit=3), False, "not known: NVML has neither a counter nor a power limit"),
        (Nvml(known=6), False, "not known: NVML does not know the card (error 6)"),
    ],
)
def test_what_a_card_tells(tmp_path, monkeypatch, library, measured, how):
    card = SimpleNamespace(name="A card", uuid="12-34")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    meter = EnergyMeter(torch.device("cuda"), powercap=tmp_path, nvml=library)
    library.millijoules += 2500
    gpu, _ = meter.read().parts
    assert library.asked == b"GPU-12-34"
    assert (gpu.device, gpu.measured) == ("A card", measured)
    assert how in gpu.how
    if measured:
        assert gpu.joules == 2.5
    assert (gpu.joules is None) == ("not known" in how)


def test_a_counter_that_fails_later_does_not_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="A card", uuid="1"))
    library = Nvml()
    meter = EnergyMeter(torch.device("cuda"), powercap=tmp_path, nvml=library)
    library.counter = 15
    found = meter.read()
    assert found.parts[0].joules is None
    assert not found.measured
    assert found.joules == found.parts[1].joules


def test_a_step_has_the_joules_of_the_cards_counter_or_none(monkeypatch):
    """The benchmarks', which claim no bound and no estimate."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="A card", uuid="1"))
    library = Nvml()
    joules = measuring.energy_counter(torch.device("cuda"), library)
    library.millijoules += 2500
    assert joules() == 2.5
    library.counter = 15
    with pytest.raises(measuring.NoEnergy, match=r"not known: NVML's counter of the card failed \(error 15\)"):
        joules()
    for without in (Nvml(counter=3), Nvml(known=6)):
        assert measuring.energy_counter(torch.device("cuda"), without) is None


def test_a_run_logs_and_records_it_and_goes_on_counting_when_resumed(tmp_path, monkeypatch):
    watts = iter([8.0, 1e6])  # so that what is from before shows

    def train(steps, resume):
        monkeypatch.setattr(energy, "WATTS_A_CORE", next(watts))
        monkeypatch.setattr(energy, "_POWERCAP", tmp_path / "none")
        run = tiny_run.trainer(tmp_path, preset="plain", max_steps=steps, save_strategy="steps", save_steps=1)
        run.train(resume_from_checkpoint=resume)
        return tiny_run.logged(run, energy.NAME), json.loads((tmp_path / energy.FILE_NAME).read_text())

    first, record = train(1, None)
    assert 0 < first[-1] <= record["joules"]
    assert (record["measured"], record["before_resuming"], record["processes"]) == (False, 0.0, 1)
    logged, record = train(2, True)
    assert record["before_resuming"] == first[-1]
    assert logged[-1] > 1000 * first[-1]
    assert record["joules"] == pytest.approx(first[-1] + record["parts"][0]["joules"])
