"""`python -m bench steps`: the reliability tax: what each preset costs per training step, as tokens per second and peak
memory, with this package's loss and with the dense one (whose teacher, where it is a mixture, is its one hidden state).

A step is all that the trainer does for one optimizer step: contexts, forwards, loss, backward, optimizer, moving
average (here every step; the presets' default is every tenth). Its completions are replayed, the same for all. The
rollout is the same call whatever preset or loss (same weights, prompts and number of tokens), so each round times one,
and "with rollout" is a step plus the rollout of its round. Ratios are medians over rounds of the ratio to plain
self-distillation ("plain") with the same loss in the same round. On a CPU memory is measured in a process of its own.

Joules of a step are what the device's counters say; where none can be read, an estimate that says how it is made
(`unisd/energy.py`), and the table marks it with "~".
"""

from __future__ import annotations

import json
import multiprocessing
import re
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.measuring.memory import extra_peak_bytes
from bench.measuring.timing import interleaved_seconds, spread
from bench.parser import command_parser
from bench.records import results_file
from bench.records.environment import chosen_device, environment
from bench.records.failures import failure_text
from bench.records.machine import multiplies_bfloat16
from bench.studies.step_runs import (
    DENSE,
    FRACTION,
    MODELS,
    NUM_AUXILIARY,
    OURS,
    PEERS,
    PLAIN,
    VARIANTS,
    Workbench,
    make_workbench,
)
from unisd.energy import Energy, EnergyMeter
from unisd.models import SMOLLM2
from unisd_kernels.backends.registry import resolve

ROLLOUT = "rollout"
# With which the default run stays below ten minutes on two CPU cores.
BATCH_SIZE, NEW_TOKENS = 4, 32
BARS = (
    f"Bars of a whole step (with rollout), ours: K = {NUM_AUXILIARY} agreement at most 1.5 times plain, with "
    f"agreement_fraction={FRACTION} at most 1.25 times."
)


def measure(
    model: str,
    device: torch.device,
    rounds: int,
    variants: Sequence[str],
    *,
    batch_size: int = BATCH_SIZE,
    new_tokens: int = NEW_TOKENS,
    with_memory: bool = True,
    dtype: torch.dtype | None = None,
) -> list[dict[str, Any]]:
    """Two rows for each variant and peer, without and with the rollout; one that fails says why."""
    from tqdm import tqdm

    with tempfile.TemporaryDirectory() as folder:
        make = partial(make_workbench, model, device, batch_size, new_tokens, dtype=dtype)
        bench = make(folder)
        sampler = bench.trainer(PLAIN, OURS)
        torch.manual_seed(0)
        completions = sampler.rollout(bench.rows)
        if any(len(completion) != new_tokens for completion in completions):
            raise RuntimeError(f"completions of {[len(each) for each in completions]} tokens instead of {new_tokens}")

        def peak(names: tuple[str, str] | None, step: Any) -> int:
            if device.type != "cpu":
                return extra_peak_bytes(step, device)
            return _in_fresh_process(make, names, completions, torch.get_num_threads())

        failures: dict[str, str] = {}
        peaks: dict[str, int] = {}
        steps: dict[str, Any] = {ROLLOUT: partial(sampler.rollout, bench.rows)}
        if with_memory:
            peaks[ROLLOUT] = peak(None, steps[ROLLOUT])
        for variant in variants:
            for peer in PEERS:
                key = _key(variant, peer)
                try:
                    step = partial(bench.trainer(variant, peer, completions).optimizer_step, bench.rows)
                    if with_memory:
                        peaks[key] = peak((variant, peer), step)
                    steps[key] = step
                except Exception as error:
                    failures[key] = failure_text(error)
        energy: dict[str, list[Energy]] = {name: [] for name in steps}
        samples = interleaved_seconds(
            steps,
            rounds,
            device,
            partial(tqdm, desc=f"steps of {model}"),
            on_failure=lambda key, error: failures.update({key: failure_text(error)}),
            watching=lambda name: _metered(device, energy[name]),
        )
    if ROLLOUT not in samples:
        raise RuntimeError(f"the rollout failed: {failures[ROLLOUT]}")
    notes = _notes(bench, device)
    rows = []
    for variant in variants:
        for peer in PEERS:
            for rollout in (False, True):
                row = {
                    "case": f"steps.{model}",
                    "preset": variant,
                    "peer": peer,
                    "rollout": rollout,
                    "tokens": batch_size * new_tokens,
                    "note": notes[peer],
                }
                key = _key(variant, peer)
                if key in failures:
                    rows.append({**row, "failure": failures[key]})
                else:
                    figures = _figures(samples, peaks, key, _key(PLAIN, peer), rollout)
                    figures |= _energy_figures(energy, samples, key, rollout)
                    rows.append({**row, **figures, "tokens_per_second": row["tokens"] / figures["median_seconds"]})
    return rows


def _key(variant: str, peer: str) -> str:
    return f"{variant} / {peer}"


def _figures(
    samples: dict[str, list[float]], peaks: dict[str, int], key: str, plain: str, rollout: bool
) -> dict[str, Any]:
    def seconds(name: str) -> list[float]:
        if not rollout:
            return samples[name]
        return [step + sampling for step, sampling in zip(samples[name], samples[ROLLOUT], strict=True)]

    times = spread(seconds(key))
    figures: dict[str, Any] = {
        "median_seconds": times.median,
        "p20_seconds": times.p20,
        "p80_seconds": times.p80,
        "samples_seconds": seconds(key),
    }
    if plain in samples:
        ratios = [a / b for a, b in zip(seconds(key), seconds(plain), strict=True)]
        figures["ratio_to_plain"] = statistics.median(ratios)
    if key in peaks:
        # Nothing of a rollout but token ids is held during the rest of the step.
        figures["extra_peak_bytes"] = max(peaks[key], peaks[ROLLOUT]) if rollout else peaks[key]
    return figures


@contextmanager
def _metered(device: torch.device, readings: list[Energy]) -> Iterator[None]:
    """Adds what is used within it."""
    meter = EnergyMeter(device)
    yield
    readings.append(meter.read())


def _energy_figures(
    energy: dict[str, list[Energy]], samples: dict[str, list[float]], key: str, rollout: bool
) -> dict[str, Any]:
    """Median joules of a step, whether counters measured it, and how in words."""
    names = (key, ROLLOUT) if rollout else (key,)
    # The uncounted round's come first.
    rounds = list(zip(*(energy[name][-len(samples[name]) :] for name in names), strict=True))
    how = [part.how for part in rounds[-1][0].parts if part.joules is not None]
    return {
        "joules": statistics.median(sum(reading.joules for reading in readings) for readings in rounds),
        "joules_measured": all(reading.measured for readings in rounds for reading in readings),
        "joules_how": "; ".join(re.sub(r" \([^)]* s over all cores\)", "", each) for each in how),
    }


def _notes(bench: Workbench, device: torch.device) -> dict[str, str]:
    dtype = bench.model.get_output_embeddings().weight.dtype
    views = {name: [row[name] for row in bench.rows] for name in ("prompt", "teacher_prompt", "negative_prompt")}
    views["auxiliary_prompts"] = [prompt for row in bench.rows for prompt in row["auxiliary_prompts"]]
    lengths = {name: max(map(len, bench.tokenizer(prompts)["input_ids"])) for name, prompts in views.items()}
    shared = (
        f"LoRA r=16, {dtype} base; {len(bench.rows)} prompts x 1 completion of {bench.new_tokens} tokens; K = "
        f"{NUM_AUXILIARY}; longest contexts in tokens: {', '.join(f'{name} {n}' for name, n in lengths.items())}; EMA "
        "updated every step; learning rate 0"
    )
    return {
        OURS: f"impl={resolve(None, device, dtype).name!r}; {shared}",
        DENSE: f"[N, V] logits, float32 statistics, autograd, each product once; same backbone, EMA kernel; {shared}",
    }


def _in_fresh_process(make: Any, names: tuple[str, str] | None, completions: list[list[int]], threads: int) -> int:
    """`_peak_bytes` in a process that has only imported its modules, which a server does once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.studies.steps"])
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(_peak_bytes, make, names, completions, threads).result()


def _peak_bytes(make: Any, names: tuple[str, str] | None, completions: list[list[int]], threads: int) -> int:
    """Extra peak of one step, or without `names` of the rollout. A small one before it warms the matrix library up."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = make(folder)
        if names is not None:
            trainer = bench.trainer(*names, completions)
            return extra_peak_bytes(partial(trainer.optimizer_step, bench.rows), torch.device("cpu"))
        sampler = bench.trainer(PLAIN, OURS)
        sampler.rollout(bench.rows[:1])
        return extra_peak_bytes(partial(sampler.rollout, bench.rows), torch.device("cpu"))


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each preset; ours and dense in each cell."""
    found = {(row["preset"], row["peer"], row["rollout"]): row for row in rows}
    columns = []
    for rollout, suffix in ((False, ""), (True, " with rollout")):
        columns += [(f"tokens/s{suffix}", "tokens_per_second", 1.0, ".1f", rollout)]
        columns += [(f"time / plain{suffix}", "ratio_to_plain", 1.0, ".2f", rollout)]
    columns += [("extra peak MB", "extra_peak_bytes", 1e-6, ".0f", False)]
    if any("joules" in row for row in rows):
        columns += [("J", "joules", 1.0, ".1f", False), ("J with rollout", "joules", 1.0, ".1f", True)]
    titles = [f"{title}: {peer}" for title, *_ in columns for peer in PEERS]
    lines = [f"| preset | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    failed = []
    for variant in dict.fromkeys(row["preset"] for row in rows):
        cells = [variant]
        for _, field, scale, form, rollout in columns:
            for peer in PEERS:
                row = found.get((variant, peer, rollout), {})
                estimated = "~" if field == "joules" and not row.get("joules_measured", True) else ""
                figure = f"{estimated}{scale * row[field]:{form}}" if field in row else ""
                cells.append("failed" if "failure" in row else figure)
        lines.append(f"| {' | '.join(cells)} |")
        for peer in PEERS:
            row = found.get((variant, peer, False), {})
            if "failure" in row:
                failed.append(f"- {variant}, {peer}: {row['failure']}")
    how = sorted({row["joules_how"] for row in rows if "joules_how" in row})
    joules = [f"J: {each}. ~: an estimate, not a measurement." for each in how]
    parts = ["\n".join(lines), *joules, BARS, *(["Failed:\n" + "\n".join(failed)] if failed else [])]
    return "\n\n".join(parts)


def _dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    if name == "auto":
        return torch.bfloat16 if device.type != "cpu" or multiplies_bfloat16() else torch.float32
    return getattr(torch, name) if name else None


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("steps", __doc__)
    parser.add_argument("--model", choices=MODELS, default=SMOLLM2)
    parser.add_argument(
        "--presets", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="ratios need plain"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        help="of the base; auto: bfloat16 where the device multiplies it; default: float32 on a CPU, else bfloat16",
    )
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="prompts, one completion each")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help="tokens of a completion")
    parser.add_argument("--output", type=Path, help="JSON file for everything, raw samples included")
    options = parser.parse_args(arguments)
    device = chosen_device(options.device)
    rows = measure(
        options.model,
        device,
        options.rounds,
        options.presets,
        batch_size=options.batch_size,
        new_tokens=options.new_tokens,
        dtype=_dtype(options.dtype, device),
    )
    print(f"{options.model}: {rows[0]['tokens']} completion tokens a step, {options.rounds} rounds\n\n{table(rows)}")
    surroundings = environment(device)
    print(f"\n{json.dumps(surroundings)}")
    if options.output:
        results_file.write_json(options.output, {"environment": surroundings, "rows": rows})
    return 0
