"""What the runs of the study left, as one JSON a part: numbers of every run and item, no texts and no paths."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.records.environment import environment
from bench.studies.study_jobs import COSTS
from bench.studies.study_methods import BASE
from bench.studies.study_plan import Planned, Sizes
from unisd.compare.runs import EVALUATIONS, BenchmarkResult, Run, load_run
from unisd.drift.schedule import NAME as DRIFT
from unisd.drift.schedule import SCALE

CURVES = {
    "loss": "loss",
    "drift": DRIFT,
    "scale": SCALE,
    "agreement_weight": "unisd/agreement_weight",
    "agreement_weight_min": "unisd/agreement_weight_min",
    "divergence": "unisd/divergence",
    "contrastive": "unisd/contrastive",
    "teacher_entropy": "unisd/teacher_entropy",
    "length": "completions/mean_length",
}
"""Name here -> name in a run's log."""
_KEPT = ("scores", "by_steps", "overall", "kinds", "items")


def collected(part: str, runs: Sequence[Planned], root: Path, sizes: Sizes, command: str) -> dict[str, Any]:
    """Everything that the page says of a part; `command` without the paths of this machine."""
    return {
        "environment": {**environment(torch.device("cpu")), "command": command},
        "part": part,
        "sizes": asdict(sizes),
        "runs": [of_run(run, root) for run in runs],
    }


def of_run(run: Planned, root: Path) -> dict[str, Any]:
    """Scores with every item's, drift, behaviour, curves and cost of a run."""
    folder = run.folder(root)
    loaded = load_run(folder / run.name)
    behaviour = folder / run.name / EVALUATIONS / "behaviour.json"
    return {
        "name": run.name,
        "variant": run.variant,
        "data": None if run.cell is None else Path(run.cell.data).stem,
        "preset": BASE if run.cell is None else run.cell.preset,
        "seed": None if run.cell is None else run.cell.seed,
        "steps": int(loaded.last("train_runtime") is not None and loaded.history[-1]["step"]),
        "evaluations": {name: _evaluation(found) for name, found in loaded.benchmarks.items()},
        "drift_kl": loaded.drift_kl,
        "own_drift": None if loaded.drift is None else _own_drift(loaded.drift),
        "behaviour": json.loads(behaviour.read_text(encoding="utf-8"))["by_kind"] if behaviour.is_file() else None,
        "curves": _curves(loaded),
        "cost": _costs(folder / "logs" / f"{run.name}.log"),
    }


def _evaluation(found: BenchmarkResult) -> dict[str, Any]:
    """Scores, and of each measure that is 0 or 1 the items' in their order, as digits; of procedural tasks also whether
    the steps are right whatever follows them."""
    rows = [found.rows[number] for number in sorted(found.rows)]
    values = {name: [float(row[name]) for row in rows] for name in found.result["scores"]}
    if found.kind == "procedural":
        values["worked"] = [float(_has_all_steps(row)) for row in rows]
    kept = {name: found.result[name] for name in _KEPT if name in found.result}
    digits = {
        name: "".join(str(int(value)) for value in column)
        for name, column in values.items()
        if set(column) <= {0.0, 1.0}
    }
    return {**kept, "digits": digits}


def _has_all_steps(row: Mapping[str, Any]) -> bool:
    """Whether every line of the right reply but the answer's is a line of the reply."""
    *steps, _ = row["gold"].splitlines()
    return set(steps) <= {line.strip() for line in row["reply"].splitlines()}


def _own_drift(result: Mapping[str, Any]) -> dict[str, Any]:
    means = {of: {name: result[of][name] for name in ("perplexity", "mean_change")} for of in ("of_tuned", "of_base")}
    return {**means, "jsd": result["jsd"]}


def _curves(run: Run) -> dict[str, list[tuple[int, float]]]:
    curves = {name: [(int(step), value) for step, value in run.curve(logged)] for name, logged in CURVES.items()}
    return {name: points for name, points in curves.items() if points}


def _costs(log: Path) -> dict[str, dict[str, float]]:
    """What the last training that ended took, and all evaluations after it."""
    file = log.with_suffix(COSTS)
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    took: dict[str, dict[str, float]] = {}
    for one in map(json.loads, lines):
        command = one.pop("command")
        if one.pop("status"):
            continue
        if command == "train":
            took = {command: one}
        elif command in took:
            before = took[command]
            for name in ("seconds", "core_seconds"):
                one[name] = round(one[name] + before[name], 1)
            took[command] = {**one, "peak_memory_gib": max(one["peak_memory_gib"], before["peak_memory_gib"])}
        else:
            took[command] = one
    return took
