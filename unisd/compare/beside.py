"""What stands beside the scores: behaviour, numbers of steps, drift, cost, and what the mechanisms did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from unisd.compare.groups import Group, Spread, spread
from unisd.compare.runs import PLACES, Run, same_items
from unisd.compare.tables import results_of, verdict
from unisd.scoring import MEASURES, Interval, paired_difference
from unisd.scoring.behaviour import KINDS

STEP_KINDS = ("procedural", "diagnostic")
STATISTICS = (
    ("unisd/agreement_weight", "agreement weight, mean"),
    ("unisd/agreement_weight_min", "least"),
    ("unisd/agreement_low_share", "share of tokens below 0.9"),
    ("unisd/disagreement", "disagreement"),
    ("unisd/contrastive", "contrastive term"),
    ("unisd/contrastive_active", "share of tokens with one"),
    ("unisd/clipped_share", "clipped share"),
    ("unisd/divergence", "divergence, nats"),
)
"""Logged number -> what it is, of the table of last values."""


@dataclass(frozen=True)
class Share:
    """A group's share of good replies to one kind of item; `difference` as in `unisd.compare.tables.Score`."""

    value: float
    low: float | None
    high: float | None
    count: int
    difference: Interval | None

    @property
    def verdict(self) -> str:
        return verdict(self.difference)


def behaviour_table(groups: Sequence[Group]) -> dict[str, list[Share | None]]:
    """Kind of item in words -> each group's share of replies as they should be; {} where no run was probed."""
    shown = [kind for kind in KINDS if any(_shares(group, kind) for group in groups)]
    return {KINDS[kind]: [_share(groups, place, kind) for place in range(len(groups))] for kind in shown}


def _shares(group: Group, kind: str) -> list[Any]:
    found = [run.behaviour["by_kind"].get(kind) for run in group.runs if run.behaviour is not None]
    return [share for share in found if share]


def _share(groups: Sequence[Group], place: int, kind: str) -> Share | None:
    shares = _shares(groups[place], kind)
    mean = spread([share["value"] for share in shares])
    if mean is None:
        return None
    single = len(shares) == 1
    low, high = (shares[0]["low"], shares[0]["high"]) if single else (mean.low, mean.high)
    before, now = (_replies(group, kind) for group in (groups[0], groups[place]))
    difference = None
    if place > 0 and before and before.keys() == now.keys():
        difference = paired_difference([before[n] for n in sorted(before)], [now[n] for n in sorted(now)])
    return Share(mean.value, low, high, shares[0]["count"], difference)


def _replies(group: Group, kind: str) -> dict[Any, float]:
    """(number, prompt) of each item of a kind -> mean over the group's runs; {} where they were not asked the same."""
    runs = [run for run in group.runs if run.behaviour_rows]
    if not runs or not all(same_items(run.behaviour_rows, runs[0].behaviour_rows) for run in runs):
        return {}
    return {
        (number, row["prompt"]): sum(run.behaviour_rows[number]["as_it_should"] for run in runs) / len(runs)
        for number, row in runs[0].behaviour_rows.items()
        if row["kind"] == kind
    }


@dataclass(frozen=True)
class Steps:
    """One evaluation by number of steps.

    Attributes:
        name: of the evaluation.
        measure: that is shown.
        steps: ascending.
        rows: for each group number of steps -> mean over its runs, with the interval of a single run.
        perplexities: for each group number of steps -> perplexity of the right reply; {} where it was not asked for.
        kinds: for each group kind of reply -> share of all replies; {} where replies have no kinds.
    """

    name: str
    measure: str
    steps: list[int]
    rows: list[dict[int, Spread]]
    perplexities: list[dict[int, Spread]]
    kinds: list[dict[str, float]]

    @property
    def kind_names(self) -> list[str]:
        """Kinds that occur."""
        return list(dict.fromkeys(kind for each in self.kinds for kind, share in each.items() if share))


def step_tables(groups: Sequence[Group]) -> list[Steps]:
    """Every evaluation that has numbers of steps."""
    tables = []
    for name in dict.fromkeys(name for group in groups for run in group.runs for name in run.benchmarks):
        found = [results_of(group, name) for group in groups]
        first = next((each for results in found for each in results), None)
        if first is None or first.kind not in STEP_KINDS:
            continue
        measure = MEASURES[first.kind][0]
        rows, perplexities, kinds = [], [], []
        for results in found:
            by_steps: dict[int, list[Any]] = {}
            counts: Counter[str] = Counter()
            for each in results:
                for steps, measures in each.by_steps.items():
                    by_steps.setdefault(steps, []).append(measures[measure])
                for of_steps in each.result.get("kinds", {}).values():
                    counts.update(of_steps)
            rows.append({steps: _over_runs(shares) for steps, shares in by_steps.items()})
            known = [each.perplexity_by_steps for each in results]
            numbers = {steps: spread([each.get(steps) for each in known]) for each in known for steps in each}
            perplexities.append({steps: value for steps, value in numbers.items() if value is not None})
            kinds.append({kind: count / counts.total() for kind, count in counts.items()})
        steps_of_all = sorted({n for row in rows for n in row})
        tables.append(Steps(name, measure.replace("_", " "), steps_of_all, rows, perplexities, kinds))
    return tables


def _over_runs(shares: Sequence[Any]) -> Spread:
    mean = spread([share["value"] for share in shares])
    assert mean is not None
    return mean if len(shares) > 1 else Spread(mean.value, shares[0]["low"], shares[0]["high"], 1)


def drift_table(groups: Sequence[Group]) -> list[dict[str, Spread | None]]:
    """For each group what is known of how far it is from its base."""
    paths = {
        "forward": ("drift", "of_tuned", "perplexity", "value"),
        "reverse": ("drift", "of_base", "perplexity", "value"),
        "jsd": ("drift", "jsd", "value"),
        "change_own": ("drift", "of_tuned", "mean_change"),
        "change_base": ("drift", "of_base", "mean_change"),
        "retention_kl": ("retention", "kl"),
        "perplexity_before": ("retention", "base_perplexity"),
        "perplexity_after": ("retention", "trained_perplexity"),
    }
    return [
        {"probe": group.spread(lambda run: run.drift_kl)}
        | {name: group.spread(partial(_dig, path)) for name, path in paths.items()}
        for group in groups
    ]


def change_percentiles(groups: Sequence[Group]) -> tuple[list[str], list[dict[str, list[Spread | None]]]]:
    """Percents, and for each group the percentiles of the change of log p on either model's completions."""
    found = [_dig(("drift", "of_tuned", "change_percentiles"), run) for group in groups for run in group.runs]
    percents = list(next((each for each in found if each), {}))
    rows = [
        {
            whose: [group.spread(partial(_dig, ("drift", of, "change_percentiles", p))) for p in percents]
            for whose, of in (("its own", "of_tuned"), ("the base's", "of_base"))
        }
        for group in groups
    ]
    return percents, rows


def _dig(path: tuple[str, ...], run: Run) -> Any:
    """A number deep in an evaluation of a run; None where it is not there."""
    value = getattr(run, path[0])
    for name in path[1:]:
        value = value.get(name) if value is not None else None
    return value


def energy_words(groups: Sequence[Group]) -> dict[str, list[str]]:
    """How the energy is known, in words -> names of the runs."""
    words: dict[str, list[str]] = {}
    for run in (run for group in groups for run in group.runs if run.energy is not None):
        assert run.energy is not None
        parts = "; ".join(f"{part['device']}: {part['how']}" for part in run.energy["parts"])
        processes = run.energy["processes"]
        words.setdefault(parts + (f"; one of {processes} processes" if processes > 1 else ""), []).append(run.name)
    return words


def is_estimate(group: Group) -> bool:
    """Whether the energy of one of its runs is not measured altogether."""
    return any(run.energy is not None and not run.energy["measured"] for run in group.runs)


def statistics_table(groups: Sequence[Group]) -> dict[str, list[Spread | None]]:
    """What a logged number is -> its last value in each group, of those that a group has."""
    rows = {label: [group.spread(partial(Run.last, name=name)) for group in groups] for name, label in STATISTICS}
    return {label: values for label, values in rows.items() if any(value is not None for value in values)}


def differing_settings(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Settings in which the trained runs differ -> their values by group; where a run is, is left out."""
    runs = [run for group in groups for run in group.runs if run.settings]
    names = sorted({name for run in runs for name in run.settings} - set(PLACES))
    differ = [name for name in names if len({_short(run.settings.get(name)) for run in runs}) > 1]
    return {
        name: [", ".join(dict.fromkeys(_short(run.settings.get(name)) for run in group.runs)) for group in groups]
        for name in differ
    }


def _short(value: Any) -> str:
    return "-" if value is None else str(value)
