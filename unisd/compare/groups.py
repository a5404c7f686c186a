"""Runs that are one thing: those whose settings differ by nothing but the seed."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from unisd.compare.runs import PLACES, Run

HOW = ("seed", "preset", "none")
"""What makes runs a group: settings that differ only by the seed, the same preset, or nothing."""


@dataclass(frozen=True)
class Group:
    """Some runs under one name; usually one, of its own name."""

    name: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> str:
        """For a reader: "seeds 0, 1, 2"; "" for a single run."""
        return "" if len(self.runs) == 1 else "seeds " + ", ".join(str(run.settings.get("seed")) for run in self.runs)

    def spread(self, number: Callable[[Run], float | None]) -> Spread | None:
        """A number of each run over the group; None where no run has it."""
        return spread([number(run) for run in self.runs])

    def spread_of(self, name: str) -> Spread | None:
        """The same of an attribute of runs, by its name."""
        return self.spread(lambda run: getattr(run, name))


@dataclass(frozen=True)
class Spread:
    """Mean of a number over runs, with the least and the most, which are equal for one run."""

    value: float
    low: float
    high: float
    count: int


def spread(numbers: Sequence[float | None]) -> Spread | None:
    """Mean, least and most of those that are known; None where none is."""
    known = [number for number in numbers if number is not None]
    return Spread(statistics.fmean(known), min(known), max(known), len(known)) if known else None


def group_runs(runs: Sequence[Run], how: str = "seed") -> list[Group]:
    """Groups in the order of their first runs.

    Runs without settings (models that were only evaluated) stay by themselves.

    Raises:
        ValueError: `how` is not in `HOW`.
    """
    if how not in HOW:
        raise ValueError(f"how must be one of {', '.join(HOW)}, got {how!r}")
    together: dict[Any, list[Run]] = {}
    for run in runs:
        members = together.setdefault(_key(run, how) or f"alone: {run.name}", [])
        seed = run.settings.get("seed")
        if how == "seed" and seed in [each.settings.get("seed") for each in members]:
            # The same settings and seed twice: something else is being compared, the code or the machine.
            together[f"alone: {run.name}"] = [run]
        else:
            members.append(run)
    names = [_name(members, how) for members in together.values()]
    return [
        Group(name if names.count(name) == 1 else members[0].name, tuple(members))
        for name, members in zip(names, together.values(), strict=True)
    ]


def _key(run: Run, how: str) -> str:
    if not run.settings or how == "none":
        return ""
    if how == "preset":
        return f"preset: {run.settings.get('preset')}"
    kept = {name: value for name, value in run.settings.items() if name not in {*PLACES, "seed", "data_seed"}}
    return json.dumps(kept, sort_keys=True, default=str)


def _name(members: Sequence[Run], how: str) -> str:
    """The name without what numbers the seed; the preset's where the rest differs."""
    if len(members) == 1:
        return members[0].name
    stems = {re.sub(r"[-_.]?(seed)?[-_.]?\d+$", "", run.name) for run in members}
    if len(stems) == 1 and how == "seed" and "" not in stems:
        return stems.pop()
    return str(members[0].settings.get("preset") or members[0].name)
