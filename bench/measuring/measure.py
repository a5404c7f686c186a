"""One case, measured: every peer's first call against float64 and its memory, then interleaved times.

A peer that cannot run is a row with the reason, never the end of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from bench.cases import Case
from bench.inputs.sets import rotating
from bench.measuring.deadline import NO_DEADLINE, Deadline
from bench.measuring.energy import NoEnergy, joules_per_step
from bench.measuring.fresh_memory import peak_in_fresh_process
from bench.measuring.memory import run_with_peak, settled_garbage
from bench.measuring.setting import make_sets, make_setting, row_of
from bench.measuring.timing import interleaved_seconds, ratios, spread
from bench.measuring.watchdog import Watchdog
from bench.peers import FLOOR, FLOORS, OURS, PEAK, PEERS
from bench.records.failures import OUT_OF_TIME, failure_text

# Seconds of a sample.
SHORTEST_ON_CPU = 1.0
MEMORY_APART = True


class DeviceLost(RuntimeError):
    """The accelerator refuses any further work in this process. `rows` are those of the case it happened in."""

    def __init__(self, message: str, rows: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.rows = rows


def device_lost(device: torch.device) -> str | None:
    """Reason why the device takes no more work, or None."""
    if device.type != "cuda":
        return None
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
    except Exception as error:
        return failure_text(error)
    return None


@settled_garbage()
def measure(
    case: Case,
    device: torch.device,
    rounds: int,
    peers: Sequence[str],
    *,
    peer_rounds: int | None = None,
    with_energy: bool = False,
    memory_apart: bool | None = None,
    shortest_on_cpu: float | None = None,
    deadline: Deadline = NO_DEADLINE,
    watchdog: Watchdog | None = None,
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """A row for each divergence and peer.

    Args:
        peer_rounds: rounds of the peers that are neither the floor nor this package; None for all.
        memory_apart: measure the memory of a peer on a CPU in a process of its own, so that nobody's leftovers count;
            None for `MEMORY_APART`.
        shortest_on_cpu: seconds of a sample at least; None for `SHORTEST_ON_CPU`.
        with_energy: measure joules a step where the device tells them; about a second for each peer.
        deadline: afterwards no peer is begun; those left are rows that say so.
        watchdog: watches each peer's calls, so that one that hangs or crashes can be told.
        keep: given the rows so far after each peer's first call, and again when a divergence is done.

    Raises:
        DeviceLost: a peer's failure took the accelerator with it.
    """
    from tqdm import tqdm

    memory_apart = MEMORY_APART if memory_apart is None else memory_apart
    sets = make_sets(case, device)
    rows: list[dict[str, Any]] = []
    for beta in case.beta:
        label = case.divergence(beta)
        setting = make_setting(case, beta, device, sets)
        steps: dict[str, Callable[[], object]] = {}
        results: dict[str, dict[str, Any]] = {}

        def watching(name: str, stage: str, label: str = label) -> AbstractContextManager[object]:
            if watchdog is None:
                return nullcontext()
            return watchdog.watching(case=case.name, operation=case.operation, divergence=label, peer=name, stage=stage)

        def failed(name: str, error: Exception, results: dict[str, dict[str, Any]] = results) -> None:
            results[name]["failure"] = failure_text(error)
            lost = device_lost(device)
            if lost is not None:
                for row in results.values():
                    row.setdefault("failure", f"not timed: {name} took the device with it")
                raise DeviceLost(f"{case.name}, {name}: {lost}", [*rows, *results.values()]) from error

        for name in tqdm(peers, desc=f"{case.name}, {label}: first calls", leave=False):
            peer = PEERS[name]
            results[name] = row_of(case, beta, peer, device)
            if name == OURS and beta in case.bars:
                results[name]["bar"] = case.bars[beta]
            if name == OURS and case.peak_bar is not None:
                results[name]["peak_bar"] = case.peak_bar
            if deadline.passed():
                results[name]["failure"] = OUT_OF_TIME
                continue
            try:
                with watching(name, "first call"):
                    step = peer.build(case, beta, device)
                    outcome, peak = run_with_peak(partial(step, sets[0]), device)
                    results[name].update(setting.errors(peer, outcome))
                    if name not in FLOORS:
                        if device.type == "cpu" and memory_apart:
                            peak = peak_in_fresh_process(case, beta, name)
                        elif peer.compiles:
                            outcome, peak = run_with_peak(partial(step, sets[0]), device)
                        results[name]["extra_peak_bytes"] = peak
                # Neighbours in a round are at different sets.
                steps[name] = rotating(step, sets, len(steps) + 1)
            except Exception as error:
                failed(name, error)
            outcome = step = None  # type: ignore[assignment]
            keep([*rows, *results.values()])
        fewer = {name: peer_rounds for name in steps if peer_rounds and not _is_ours(name)}
        samples = interleaved_seconds(
            steps,
            rounds,
            device,
            partial(tqdm, desc=f"{case.name}, {label}: rounds", leave=False),
            fewer,
            deadline.passed,
            failed,
            warm=True,
            shortest_on_cpu=SHORTEST_ON_CPU if shortest_on_cpu is None else shortest_on_cpu,
            watching=partial(watching, stage="rounds"),
        )
        for name in samples:
            results[name].update(_figures(samples, name))
        keep([*rows, *results.values()])
        for name in samples if with_energy else ():
            try:
                with watching(name, "energy"):
                    results[name]["joules"] = joules_per_step(steps[name], device)
            except NoEnergy as error:
                results[name]["note"] = f"{results[name]['note']}; no joules: {error}".removeprefix("; ")
            except Exception as error:
                failed(name, error)
        rows.extend(results.values())
        keep(rows)
    return rows


def _figures(samples: dict[str, list[float]], name: str) -> dict[str, Any]:
    times = spread(samples[name])
    figures: dict[str, Any] = {}
    if FLOOR in samples:
        of_floor = spread(ratios(samples, name, FLOOR))
        figures["ratio_to_floor"] = of_floor.median
        figures["ratio_p20"], figures["ratio_p80"] = of_floor.p20, of_floor.p80
    if samples.get(PEAK):
        figures["share_of_peak"] = spread(ratios(samples, PEAK, name)).median
    figures["median_seconds"] = times.median
    figures["p20_seconds"], figures["p80_seconds"] = times.p20, times.p80
    figures["samples_seconds"] = samples[name]
    return figures


def _is_ours(name: str) -> bool:
    return name in (*FLOORS, OURS) or PEERS[name].variant
