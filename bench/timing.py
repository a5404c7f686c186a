"""Interleaved timing: every contender once a round, so that a drift of the machine touches all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping

import torch


def interleaved_seconds(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    progress: Callable[[range], Iterable[int]] = lambda rounds: rounds,
) -> dict[str, list[float]]:
    """Raw seconds of each contender, one sample a round, after one uncounted round."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for round_index in progress(range(rounds + 1)):
        for name, step in steps.items():
            if device.type == "cuda":
                start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start_event.record()
                step()
                end_event.record()
                end_event.synchronize()
                seconds = start_event.elapsed_time(end_event) / 1e3
            else:
                start = time.perf_counter()
                step()
                seconds = time.perf_counter() - start
            if round_index:
                samples[name].append(seconds)
    return samples


def median_ratio(samples: dict[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of the ratio within the round."""
    return statistics.median(a / b for a, b in zip(samples[name], samples[base], strict=True))
