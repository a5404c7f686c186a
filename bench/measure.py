"""One case, measured: every contender's first call against float64, its memory, then interleaved times.

A contender that cannot run is a row with the reason, never the end of the table.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from bench.accuracy import expected_outcome
from bench.cases import Case, make_inputs
from bench.deadline import NO_DEADLINE, Deadline
from bench.memory import extra_peak_bytes
from bench.peers import FLOOR, PEERS, NotOffered, Step
from bench.timing import interleaved_seconds, median_ratio, spread

OUT_OF_TIME = "left out: out of time"


class DeviceLost(RuntimeError):
    """The accelerator refuses any further work in this process. `rows` are those of the case it happened in."""

    def __init__(self, message: str, rows: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.rows = rows


def failure_text(error: Exception) -> str:
    """What a table shows in place of a time."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, ImportError):
        return f"not installed: {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = (lines[0] if lines else "no message").replace("|", "/")
    text = first if len(first) <= 160 else first[:157] + "..."
    return f"not offered: {text}" if isinstance(error, NotOffered) else f"{type(error).__name__}: {text}"


def measure_memory(case: str, peer: str, beta: float, device: str) -> int:
    """Extra peak bytes of one step, from a fresh process."""
    command = [sys.executable, "-m", "bench", "--case", case, "--device", device, "--memory-of", peer]
    result = subprocess.run([*command, "--beta", str(beta)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"measuring the memory of {peer!r} failed:\n{result.stderr[-2000:]}")
    return int(result.stdout.split()[-1])


def device_lost(device: torch.device) -> str | None:
    """Why the device takes no more work, or None."""
    if device.type != "cuda":
        return None
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
    except Exception as error:
        return failure_text(error)
    return None


def measure(
    case: Case,
    device: torch.device,
    rounds: int,
    peers: Sequence[str],
    *,
    peer_rounds: int | None = None,
    with_memory: bool = True,
    deadline: Deadline = NO_DEADLINE,
) -> list[dict[str, Any]]:
    """A row for each divergence and contender.

    Args:
        peer_rounds: rounds of the contenders that are neither the floor nor this package; None for all.
        with_memory: measure extra peak memory; on a CPU this takes a process for each contender.
        deadline: afterwards no contender is begun; those left are rows that say so.

    Raises:
        DeviceLost: a contender's failure took the accelerator with it.
    """
    from tqdm import tqdm

    inputs = make_inputs(case, device)
    rows: list[dict[str, Any]] = []
    for beta in case.beta:
        label = "none" if case.operation == "scoring" else divergence_name(beta)
        expected = expected_outcome(inputs, beta)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what inputs and reference left behind is room for the contenders
        steps: dict[str, Step] = {}
        results: dict[str, dict[str, Any]] = {}

        def failed(name: str, error: Exception, results: dict[str, dict[str, Any]] = results) -> None:
            results[name]["failure"] = failure_text(error)
            lost = device_lost(device)
            if lost is not None:
                for row in results.values():
                    row.setdefault("failure", f"not timed: {name} took the device with it")
                raise DeviceLost(f"{case.name}, {name}: {lost}", [*rows, *results.values()]) from error

        for name in peers:
            peer = PEERS[name]
            results[name] = {"case": case.name, "divergence": label, "peer": name, "note": peer.note}
            if deadline.passed():
                results[name]["failure"] = OUT_OF_TIME
                continue
            try:
                step = peer.build(inputs, beta)
                outcome = step()
                results[name].update(expected.errors(outcome, peer.mean_only))
                if with_memory and device.type == "cuda" and name != FLOOR:
                    results[name]["extra_peak_bytes"] = extra_peak_bytes(step, device)
                steps[name] = step
            except Exception as error:
                failed(name, error)
            outcome = step = None  # type: ignore[assignment]
        if with_memory and device.type != "cuda":
            for name in steps:
                if name != FLOOR:
                    results[name]["extra_peak_bytes"] = measure_memory(case.name, name, beta, str(device))
        fewer = {name: peer_rounds for name in steps if peer_rounds and not _is_ours(name)}
        samples = interleaved_seconds(
            steps, rounds, device, partial(tqdm, desc=f"{case.name}, {label}"), fewer, deadline.passed, failed
        )
        for name in samples:
            if FLOOR in samples:
                results[name]["ratio_to_floor"] = median_ratio(samples, name, FLOOR)
            times = spread(samples[name])
            results[name]["median_seconds"] = times.median
            results[name]["p20_seconds"], results[name]["p80_seconds"] = times.p20, times.p80
            results[name]["samples_seconds"] = samples[name]
        rows.extend(results.values())
    return rows


def divergence_name(beta: float) -> str:
    return {0.0: "forward KL", 1.0: "reverse KL"}.get(beta, f"JSD beta={beta:g}")


def _is_ours(name: str) -> bool:
    return name == FLOOR or name.startswith("unisd")
