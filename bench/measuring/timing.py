"""Interleaved timing: every peer once a round, so that a drift of the machine touches all alike.

The order turns round from one round to the next, so that none always follows the same other. On CUDA a sample is the
time between two events. A step shorter than two milliseconds is repeated inside its sample, so that the events' own
resolution does not count. That no peer finds its inputs in a cache is the caller's part (`inputs/sets.py`).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

SHORTEST_SAMPLE = 2e-3
MOST_REPETITIONS = 50
MOST_ON_CPU = 10


class Spread(NamedTuple):
    """Median, 0.2 and 0.8 quantile of the samples."""

    median: float
    p20: float
    p80: float


def interleaved_seconds(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    progress: Callable[[range], Iterable[int]] = lambda rounds: rounds,
    fewer_rounds: Mapping[str, int] | None = None,
    out_of_time: Callable[[], bool] = lambda: False,
    on_failure: Callable[[str, Exception], None] | None = None,
    warm: bool = False,
    shortest_on_cpu: float = 0.0,
    watching: Callable[[str], AbstractContextManager[object]] = lambda name: nullcontext(),
) -> dict[str, list[float]]:
    """Raw seconds of each peer, one sample a round, after one uncounted round.

    Args:
        warm: the steps have run before: no uncounted round on a CPU. On CUDA it finds out how often to repeat a step.
        fewer_rounds: peers that take part in the first rounds only, and in how many.
        out_of_time: asked before each round but the first counted one; true ends the measurement.
        shortest_on_cpu: seconds that a sample takes at least on a CPU, by repeating its step: on a shared machine a
            short one is at the mercy of whatever runs beside it.
        on_failure: told of a peer that raises, which then has no samples; None lets the exception through.
        watching: entered around each sample of a peer, outside what is timed.
    """
    fewer_rounds = fewer_rounds or {}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    repetitions = dict.fromkeys(steps, 1)
    first = 1 if warm and device.type != "cuda" else 0
    for round_index in progress(range(first, rounds + 1)):
        if round_index > 1 and out_of_time():
            break
        for name in list(samples)[:: -1 if round_index % 2 else 1]:
            if round_index > fewer_rounds.get(name, rounds):
                continue
            try:
                with watching(name):
                    if round_index == 0:
                        repetitions[name] = _warm_up(steps[name], device)
                    else:
                        samples[name].append(_seconds(steps[name], repetitions[name], device, shortest_on_cpu))
            except Exception as error:
                if on_failure is None:
                    raise
                del samples[name]
                on_failure(name, error)
    return samples


def _warm_up(step: Callable[[], object], device: torch.device) -> int:
    """Run it uncounted; how often it is to be repeated inside a sample."""
    _seconds(step, 1, device)
    return repetitions_for(_seconds(step, 1, device)) if device.type == "cuda" else 1


def repetitions_for(seconds: float) -> int:
    """Number of steps of this length that make a sample of two milliseconds."""
    return max(1, min(MOST_REPETITIONS, math.ceil(SHORTEST_SAMPLE / max(seconds, 1e-9))))


def _seconds(step: Callable[[], object], repetitions: int, device: torch.device, shortest_on_cpu: float = 0.0) -> float:
    """Mean seconds of one step."""
    if device.type == "cuda":
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        for _ in range(repetitions):
            step()
        end_event.record()
        end_event.synchronize()
        return start_event.elapsed_time(end_event) / 1e3 / repetitions
    start, count, elapsed = time.perf_counter(), 0, 0.0
    while count == 0 or (elapsed < shortest_on_cpu and count < MOST_ON_CPU):
        step()
        count += 1
        elapsed = time.perf_counter() - start
    return elapsed / count


def ratios(samples: Mapping[str, list[float]], name: str, base: str) -> list[float]:
    """Within each round that both took part in."""
    return [a / b for a, b in zip(samples[name], samples[base], strict=False)]


def spread(samples: list[float]) -> Spread:
    ordered = torch.tensor(samples, dtype=torch.float64)
    p20, p80 = torch.quantile(ordered, torch.tensor([0.2, 0.8], dtype=torch.float64)).tolist()
    return Spread(statistics.median(samples), p20, p80)
