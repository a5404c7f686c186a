"""What a folder says of a run: its settings, its log, and its evaluations in `eval/`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from unisd.drift.schedule import NAME as DRIFT
from unisd.scoring import MEASURES

EVALUATIONS = "eval"
"""Folder of a run's evaluations: `unisd eval ... -o RUN/eval`."""
_PEAK = "unisd/peak_memory_gib"


@dataclass(frozen=True)
class BenchmarkResult:
    """The file and completions of a benchmark, or of the procedural tasks or the diagnostic.

    Attributes:
        name: of the benchmark; of the file where that adds to it ("procedural-hard").
        kind: of the benchmark.
        result: the JSON of `unisd eval`.
        rows: completions by number of the row.
    """

    name: str
    kind: str
    result: Mapping[str, Any]
    rows: Mapping[int, Mapping[str, Any]]

    @property
    def measure(self) -> str:
        """The measure that counts first."""
        return MEASURES[self.kind][0]

    @property
    def score(self) -> Mapping[str, Any] | None:
        """That measure with its interval; None where no replies were asked for."""
        scores: Mapping[str, Any] = self.result["scores"]
        return scores.get(self.measure)

    def has_items_of(self, other: BenchmarkResult) -> bool:
        """Whether both were asked the same: rows of the same numbers, with the same prompts where they are kept."""
        return self.rows.keys() == other.rows.keys() and all(
            row.get("prompt") == other.rows[number].get("prompt") for number, row in self.rows.items()
        )


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: of its folder.
        settings: resolved, {} where there are none (a model that was only evaluated).
        history: entries of the trainer's log.
        benchmarks: by name.
        drift: of `unisd eval drift --output RUN/eval/drift.json`, or None.
    """

    name: str
    settings: Mapping[str, Any]
    history: tuple[Mapping[str, Any], ...]
    benchmarks: Mapping[str, BenchmarkResult]
    drift: Mapping[str, Any] | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)

    def curve(self, name: str) -> list[tuple[float, float]]:
        """Points (step, value) of a number that was logged; infinite ones and NaN are left out."""
        return [
            (float(entry["step"]), float(entry[name]))
            for entry in self.history
            if isinstance(entry.get(name), (int, float)) and math.isfinite(entry[name]) and "step" in entry
        ]

    def last(self, name: str) -> float | None:
        """The last value of a number that was logged."""
        points = self.curve(name)
        return points[-1][1] if points else None

    @property
    def drift_kl(self) -> float | None:
        """Last KL from the base on the run's probe, nats a token."""
        return self.last(DRIFT)

    @property
    def seconds(self) -> float | None:
        """Seconds of training."""
        return self.last("train_runtime")

    @property
    def peak_memory(self) -> float | None:
        """GiB, the most that was logged."""
        return max((value for _, value in self.curve(_PEAK)), default=None)


def load_run(folder: Path) -> Run:
    """A run by its folder.

    Args:
        folder: of `unisd train`, with `eval/` in it; or of `unisd eval` alone (a base model, say).

    Raises:
        ValueError: no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    evaluated = folder / EVALUATIONS if (folder / EVALUATIONS).is_dir() else folder
    settings = _yaml(folder / "unisd_config.yaml")
    state = _json(folder / "trainer_state.json") or {}
    benchmarks: dict[str, BenchmarkResult] = {}
    environment: Mapping[str, Any] = {}
    for file in sorted(evaluated.glob("*.json")):
        result = _json(file)
        if isinstance(result, Mapping) and "benchmark" in result and "kind" in result:
            benchmark = result["benchmark"]
            name = file.stem if file.stem.startswith(benchmark) else benchmark
            if name in benchmarks:
                raise ValueError(
                    f"{evaluated} holds two files with scores of {name}; one is {file.name}: move one away"
                )
            rows = _rows(file.with_suffix(".jsonl"))
            benchmarks[name] = BenchmarkResult(name, result["kind"], result, rows)
            environment = result.get("environment") or environment
    drift = _json(evaluated / "drift.json")
    if not state and not benchmarks and drift is None:
        raise ValueError(
            f"{folder} is no run: it holds neither trainer_state.json (unisd train) nor scores (unisd eval NAME -o "
            f"{folder / EVALUATIONS})"
        )
    name = folder.resolve().name
    return Run(name, settings, tuple(state.get("log_history", ())), benchmarks, drift, environment)


def differing_settings(runs: list[Run]) -> dict[str, list[str]]:
    """Settings in which the runs differ -> their values; folders and what follows from them are left out."""
    names = sorted({name for run in runs for name in run.settings} - {"output_dir", "logging_dir", "run_name"})
    shown = {name: [_short(run.settings.get(name)) for run in runs] for name in names}
    trained = [run for run in runs if run.settings]
    return {
        name: values for name, values in shown.items() if len({_short(run.settings.get(name)) for run in trained}) > 1
    }


def _short(value: Any) -> str:
    return "-" if value is None else str(value) if not isinstance(value, (dict, list)) else json.dumps(value)


def _yaml(file: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.is_file() else {}


def _json(file: Path) -> Any:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None


def _rows(file: Path) -> dict[int, dict[str, Any]]:
    if not file.is_file():
        return {}
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    return {int(row["number"]): row for row in rows}
