"""Intervals of the study: of a method over its seeds, and of two methods on the same items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.studies.study_methods import BASE
from unisd.scoring import Interval, mean_interval, paired_difference, wilson

Run = Mapping[str, Any]


def by_method(runs: Sequence[Run], data: str) -> dict[str, list[Run]]:
    """Preset -> its runs on a source of rows, base first."""
    groups = {BASE: [run for run in runs if run["preset"] == BASE]}
    for run in runs:
        if run["data"] == data:
            groups.setdefault(run["preset"], []).append(run)
    return {name: group for name, group in groups.items() if group}


def items_of(group: Sequence[Run], task: str, measure: str) -> list[float]:
    """Means over the runs, item by item."""
    columns = [[float(digit) for digit in run["evaluations"][task]["digits"][measure]] for run in group]
    return [sum(column) / len(column) for column in zip(*columns, strict=True)]


def share(group: Sequence[Run], task: str, measure: str) -> Interval:
    """Mean over runs and items; of one run Wilson's interval, of several the bootstrap's over items."""
    values = items_of(group, task, measure)
    return wilson(round(sum(values)), len(values)) if len(group) == 1 else mean_interval(values)


def difference(first: Sequence[Run], second: Sequence[Run], task: str, measure: str) -> Interval:
    """How much higher the second is, on the same items (paired bootstrap of the means over seeds)."""
    return paired_difference(items_of(first, task, measure), items_of(second, task, measure))


def is_significant(interval: Interval) -> bool:
    """Whether a 95% interval leaves 0 out."""
    return interval.low > 0 or interval.high < 0


def range_over_seeds(group: Sequence[Run], task: str, measure: str) -> tuple[float, float]:
    """The least and the most of the runs' means."""
    means = [run["evaluations"][task]["scores"][measure]["value"] for run in group]
    return min(means), max(means)
