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
from unisd.energy import FILE_NAME as ENERGY
from unisd.evaluation.folder import EVALUATIONS
from unisd.scoring import MEASURES

PLACES = ("output_dir", "logging_dir", "run_name", "hub_model_id")
"""Settings that say where a run is, not what it is."""
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
    def by_steps(self) -> dict[int, Mapping[str, Any]]:
        """Number of steps -> measure -> its interval; {} for what has no steps."""
        found = self.result.get("by_steps", {})
        if isinstance(found, Mapping):
            return {int(steps): measures for steps, measures in found.items()}
        return {entry["num_steps"]: entry["scores"] for entry in found if entry["scores"]}

    @property
    def perplexity_by_steps(self) -> dict[int, float]:
        """Number of steps -> perplexity of the right reply; {} where it was not asked for."""
        found = self.result.get("by_steps", [])
        entries = [] if isinstance(found, Mapping) else found
        return {each["num_steps"]: each["perplexity"] for each in entries if each["perplexity"] is not None}

    @property
    def score(self) -> Mapping[str, Any] | None:
        """That measure with its interval; None where no replies were asked for."""
        scores: Mapping[str, Any] = self.result["scores"]
        return scores.get(self.measure)

    def has_items_of(self, other: BenchmarkResult) -> bool:
        """Whether both were asked the same, as far as rows are kept."""
        return bool(self.rows) and same_items(self.rows, other.rows)


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: of its folder.
        settings: resolved, {} where there are none (a model that was only evaluated).
        history: entries of the trainer's log.
        benchmarks: by name.
        drift, retention, behaviour: of `unisd eval drift retention behaviour -o RUN/eval`, or None.
        behaviour_rows: replies to the probe, by number.
        energy: of training (`unisd.energy`), or None.
        environment: versions and machine of the evaluation, else {}.
    """

    name: str
    settings: Mapping[str, Any]
    history: tuple[Mapping[str, Any], ...]
    benchmarks: Mapping[str, BenchmarkResult]
    drift: Mapping[str, Any] | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    retention: Mapping[str, Any] | None = None
    behaviour: Mapping[str, Any] | None = None
    behaviour_rows: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    energy: Mapping[str, Any] | None = None

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
    def joules(self) -> float | None:
        """Energy of training; see `energy` for how it is known."""
        return None if self.energy is None else float(self.energy["joules"])

    @property
    def peak_memory(self) -> float | None:
        """GiB, the most that was logged."""
        return max((value for _, value in self.curve(_PEAK)), default=None)


def same_items(rows: Mapping[int, Mapping[str, Any]], others: Mapping[int, Mapping[str, Any]]) -> bool:
    """Whether they have the same numbers, with the same prompts where they are kept."""
    return rows.keys() == others.keys() and all(
        row.get("prompt") == others[number].get("prompt") for number, row in rows.items()
    )


def load_run(folder: Path, name: str | None = None, *, with_rows: bool = True) -> Run:
    """A run by its folder.

    Args:
        folder: of `unisd train`, with `eval/` in it; or of `unisd eval` alone (a base model, say).
        name: to show; None for the folder's.
        with_rows: also read what was asked and replied, item by item.

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
            called = file.stem if file.stem.startswith(benchmark) else benchmark
            if called in benchmarks:
                raise ValueError(
                    f"{evaluated} holds two files with scores of {called}; one is {file.name}: move one away"
                )
            rows = _rows(file.with_suffix(".jsonl")) if with_rows else {}
            benchmarks[called] = BenchmarkResult(called, result["kind"], result, rows)
            environment = result.get("environment") or environment
    others = {what: _json(evaluated / f"{what}.json") for what in ("drift", "retention", "behaviour")}
    for other in others.values():
        environment = environment or (other or {}).get("environment", {})
    if not state and not benchmarks and not any(others.values()):
        raise ValueError(
            f"{folder} is no run: it holds neither trainer_state.json (unisd train) nor scores (unisd eval NAME -o "
            f"{folder / EVALUATIONS})"
        )
    return Run(
        name or folder.resolve().name,
        settings,
        tuple(state.get("log_history", ())),
        benchmarks,
        environment=environment,
        behaviour_rows=_rows(evaluated / "behaviour.jsonl") if with_rows else {},
        energy=_json(folder / ENERGY),
        **others,
    )


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
    return {int(row.get("number", place)): row for place, row in enumerate(rows)}
