"""Intervals of the study: of a method over its seeds, and of two methods on the same items.

What another run of a method would give depends on its seed as much as on the items, so both are drawn: a two-level
bootstrap, seeds with replacement and items with replacement. In whole numbers, so that every machine gets the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.studies.study_methods import BASE
from unisd.scoring import Interval, wilson

Run = Mapping[str, Any]
_DRAWS = 4000


def by_method(runs: Sequence[Run], data: str) -> dict[str, list[Run]]:
    """Preset -> its runs on a source of rows, base first."""
    groups = {BASE: [run for run in runs if run["preset"] == BASE]}
    for run in runs:
        if run["data"] == data:
            groups.setdefault(run["preset"], []).append(run)
    return {name: group for name, group in groups.items() if group}


def items_of(group: Sequence[Run], task: str, measure: str) -> list[list[int]]:
    """Right (1) or not, by run and item."""
    return [[int(digit) for digit in run["evaluations"][task]["digits"][measure]] for run in group]


def mean_of(group: Sequence[Run], task: str, measure: str) -> float:
    """Over runs and items."""
    return float(np.mean(items_of(group, task, measure)))


def share(group: Sequence[Run], task: str, measure: str) -> Interval:
    """Mean over runs and items; of one run, or where nothing differs, Wilson's interval; else the two-level one."""
    values = items_of(group, task, measure)
    drawn = two_level(values)
    alone = len(group) == 1 or drawn.low == drawn.high
    return wilson(sum(values[0]), len(values[0])) if alone else drawn


def difference(first: Sequence[Run], second: Sequence[Run], task: str, measure: str) -> Interval:
    """How much higher the second is, on the same items; runs of the same seed, which saw the same rows, in pairs.

    Raises:
        ValueError: several runs on both sides with different seeds.
    """
    a, b = (np.array(items_of(group, task, measure)) for group in (first, second))
    seeds = [[run["seed"] for run in group] for group in (first, second)]
    if min(map(len, seeds)) > 1 and seeds[0] != seeds[1]:
        raise ValueError(f"runs are compared seed by seed, got the seeds {seeds[0]} and {seeds[1]}")
    return two_level((b - a).tolist())  # one run against several: against each of them


def two_level(values: Sequence[Sequence[int]], confidence: float = 0.95) -> Interval:
    """Mean of whole numbers by seed and item, with its interval."""
    table = np.array(values, dtype=np.int64)
    seeds, items = table.shape
    of_seeds, of_items = _drawn(seeds, items)
    sums = np.sort(((of_seeds @ table) * of_items).sum(axis=1))
    tail = (1 - confidence) / 2
    low, high = sums[math.floor(tail * (_DRAWS - 1))], sums[math.ceil((1 - tail) * (_DRAWS - 1))]
    return Interval(int(table.sum()) / table.size, int(low) / table.size, int(high) / table.size, items)


@functools.cache
def _drawn(seeds: int, items: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each seed and each item is drawn, by draw."""
    drawn = np.random.RandomState(0)  # whose stream numpy keeps as it is
    of_seeds, of_items = (drawn.multinomial(n, [1 / n] * n, size=_DRAWS) for n in (seeds, items))
    return of_seeds, of_items


def range_over_seeds(group: Sequence[Run], task: str, measure: str) -> tuple[float, float]:
    """The least and the most of the runs' means."""
    means = [run["evaluations"][task]["scores"][measure]["value"] for run in group]
    return min(means), max(means)
