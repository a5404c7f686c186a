"""The numbers of a comparison: scores and their differences from the first run, cost, drift, completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unisd.compare.runs import Run
from unisd.scoring import Interval, paired_difference


@dataclass(frozen=True)
class Score:
    """One run on one benchmark.

    Attributes:
        value, low, high: share with its interval; None where the run was not evaluated on it.
        count: items.
        difference: to the first run on the same items, with its interval; None for the first, and where items are not
            the same.
        second: name and value of the more lenient measure, where the kind of task has one.
    """

    value: float | None
    low: float | None
    high: float | None
    count: int
    difference: Interval | None
    second: tuple[str, float] | None = None

    @property
    def verdict(self) -> str:
        """ "better" or "worse" than the first run where the interval of the difference leaves out 0, else ""."""
        if self.difference is None or self.difference.low <= 0 <= self.difference.high:
            return ""
        return "better" if self.difference.value > 0 else "worse"


def score_table(runs: Sequence[Run]) -> dict[str, list[Score]]:
    """Benchmark -> a score for each run, by the measure that counts first."""
    names = list(dict.fromkeys(name for run in runs for name in run.benchmarks))
    return {name: [_score(runs, place, name) for place in range(len(runs))] for name in names}


def _score(runs: Sequence[Run], place: int, name: str) -> Score:
    found = runs[place].benchmarks.get(name)
    scores = None if found is None else found.score
    if found is None or scores is None:
        return Score(None, None, None, 0, None)
    first = runs[0].benchmarks.get(name)
    difference = None
    if place > 0 and first is not None and found.rows and found.has_items_of(first):
        numbers = sorted(found.rows)
        before, now = ([float(each.rows[n][found.measure]) for n in numbers] for each in (first, found))
        difference = paired_difference(before, now)
    lenient = found.result["scores"].get("lenient")
    second = None if lenient is None else ("lenient", lenient["value"])
    return Score(scores["value"], scores["low"], scores["high"], scores["count"], difference, second)


def mean_gain(table: Mapping[str, Sequence[Score]], num_runs: int) -> list[float | None]:
    """For each run the mean over the benchmarks of `score_table` of its difference to the first; None where there is
    none to tell."""
    gains: list[float | None] = []
    for place in range(num_runs):
        differences = [scores[place].difference for scores in table.values()]
        known = [difference.value for difference in differences if difference is not None]
        gains.append(0.0 if place == 0 else sum(known) / len(known) if known else None)
    return gains


def completions_side_by_side(runs: Sequence[Run], most: int = 6) -> list[dict[str, Any]]:
    """Items on which the runs disagree first, then others: prompt, gold and each run's reply with its score."""
    out = []
    for name in dict.fromkeys(name for run in runs for name in run.benchmarks):
        with_it = [run for run in runs if name in run.benchmarks and run.benchmarks[name].rows]
        if len(with_it) < 2:
            continue
        results = [run.benchmarks[name] for run in with_it]
        shared = sorted(set.intersection(*(set(result.rows) for result in results)))
        asked = [{str(result.rows[n].get("prompt")) for result in results} for n in shared]
        numbers = [n for n, prompts in zip(shared, asked, strict=True) if len(prompts) == 1]
        measure = results[0].measure
        disagree = [n for n in numbers if len({result.rows[n][measure] for result in results}) > 1]
        for number in [*disagree, *(n for n in numbers if n not in set(disagree))][:most]:
            rows = [result.rows[number] for result in results]
            if "prompt" not in rows[0]:
                break  # a secret benchmark
            replies = [
                {"run": run.name, "reply": row["reply"], "score": row[measure]}
                for run, row in zip(with_it, rows, strict=True)
            ]
            prompt = rows[0]["prompt"]
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            out.append(
                {"benchmark": name, "number": number, "prompt": text, "gold": rows[0]["gold"], "replies": replies}
            )
    return out
