"""The scores of a comparison: each group of runs on each benchmark, and its difference from the first group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unisd.compare.groups import Group, Spread, spread
from unisd.compare.runs import BenchmarkResult, Run
from unisd.scoring import Interval, mean_interval, paired_difference


@dataclass(frozen=True)
class Score:
    """One group on one benchmark.

    Attributes:
        value: share, the mean over the group's runs; None where none was evaluated on it.
        low, high: its interval over items; None where runs of the group were not asked the same.
        count: items.
        difference: to the first group on the same items, with its interval; None for the first, and where items are not
            the same. Over several runs an item counts with its mean.
        over_runs: the least and the most of the group's runs; None for a single one.
        second: name and value of the more lenient measure, where the kind of task has one.
    """

    value: float | None
    low: float | None
    high: float | None
    count: int
    difference: Interval | None
    over_runs: Spread | None = None
    second: tuple[str, float] | None = None

    @property
    def verdict(self) -> str:
        """ "better" or "worse" than the first group where the interval of the difference leaves out 0, else ""."""
        return verdict(self.difference)


def verdict(difference: Interval | None) -> str:
    """ "better" or "worse" where the interval leaves out 0, else ""."""
    if difference is None or not difference.leaves_out_zero:
        return ""
    return "better" if difference.value > 0 else "worse"


def score_table(groups: Sequence[Group]) -> dict[str, list[Score]]:
    """Benchmark -> a score for each group, by the measure that counts first."""
    names = list(dict.fromkeys(name for group in groups for run in group.runs for name in run.benchmarks))
    return {name: [_score(groups, place, name) for place in range(len(groups))] for name in names}


def results_of(group: Group, name: str) -> list[BenchmarkResult]:
    """A benchmark's results of the group's runs, those with a score."""
    found = [run.benchmarks[name] for run in group.runs if name in run.benchmarks]
    return [each for each in found if each.score is not None]


def _score(groups: Sequence[Group], place: int, name: str) -> Score:
    found = results_of(groups[place], name)
    if not found:
        return Score(None, None, None, 0, None)
    scores = [each.score or {} for each in found]
    over_runs = spread([score["value"] for score in scores])
    if over_runs is None:
        return Score(None, None, None, 0, None)
    items = _item_means(found)
    low, high = scores[0]["low"], scores[0]["high"]
    if len(found) > 1:
        interval = None if items is None else mean_interval(items)
        low, high = (None, None) if interval is None else (interval.low, interval.high)
    difference = None
    first = results_of(groups[0], name)
    if place > 0 and first and items is not None and found[0].has_items_of(first[0]):
        before = _item_means(first)
        difference = None if before is None else paired_difference(before, items)
    lenient = spread([score["value"] for each in found if (score := each.result["scores"].get("lenient"))])
    return Score(
        over_runs.value,
        low,
        high,
        scores[0]["count"],
        difference,
        over_runs if len(found) > 1 else None,
        None if lenient is None else ("lenient", lenient.value),
    )


def _item_means(found: Sequence[BenchmarkResult]) -> list[float] | None:
    """Each item's mean over the runs, in the order of the numbers; None where they were not asked the same."""
    first = found[0]
    if not all(each.has_items_of(first) for each in found):
        return None
    return [sum(float(each.rows[n][each.measure]) for each in found) / len(found) for n in sorted(first.rows)]


def mean_gain(table: Mapping[str, Sequence[Score]], groups: Sequence[Group]) -> list[Spread | None]:
    """For each group the mean over the benchmarks of `score_table` of its difference to the first, with the least and
    the most of its runs; None where there is none to tell."""
    gains: list[Spread | None] = []
    for place, group in enumerate(groups):
        known = {name: scores for name, scores in table.items() if scores[place].difference is not None}
        if place == 0:
            gains.append(Spread(0.0, 0.0, 0.0, len(group.runs)))
        else:
            gains.append(spread([_gain(run, known) for run in group.runs]))
    return gains


def _gain(run: Run, known: Mapping[str, Sequence[Score]]) -> float | None:
    changes = []
    for name, scores in known.items():
        score = run.benchmarks[name].score if name in run.benchmarks else None
        if score is None or scores[0].value is None:
            return None
        changes.append(score["value"] - scores[0].value)
    return sum(changes) / len(changes) if changes else None
