"""The comparison as one HTML page that needs nothing else, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from unisd.compare import beside, figures
from unisd.compare.completions import completions_side_by_side
from unisd.compare.figures import Ranged
from unisd.compare.finding import findings
from unisd.compare.groups import Group, Spread, group_runs
from unisd.compare.runs import Run
from unisd.compare.tables import mean_gain, score_table
from unisd.drift.schedule import NAME as DRIFT
from unisd.evaluation.behaviour import LIMITS

CURVES = (("loss", "loss"), (DRIFT, "KL from the base, nats a token"))
"""Logged number -> what it is, of the curves that are looked at first."""
MORE_CURVES = (
    ("unisd/divergence", "divergence, nats a token"),
    ("unisd/agreement_weight", "mean agreement weight"),
    ("unisd/agreement_low_share", "share of agreement weights below 0.9"),
    ("unisd/contrastive", "contrastive term"),
    ("unisd/clipped_share", "clipped share"),
    ("completions/mean_length", "tokens a completion"),
    ("unisd/student_entropy", "entropy of the student, nats"),
    ("grad_norm", "norm of the gradient"),
    ("learning_rate", "learning rate"),
    ("unisd/energy_joules", "energy, J"),
)
"""The others, which are folded."""


def page(runs: Sequence[Run], title: str, **options: Any) -> str:
    """The page of some runs; see `rendered`."""
    return rendered(runs, title, **options)[0]


def rendered(
    runs: Sequence[Run],
    title: str,
    *,
    group: str = "seed",
    notes: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
    brief: bool = False,
) -> tuple[str, str]:
    """The page, and its tables as Markdown.

    Args:
        runs: the first is what the others are compared with.
        title: heading.
        group: which runs are one, see `unisd.compare.groups.HOW`.
        notes: paragraphs under the finding.
        facts: further lines of "Where it was run", by name.
        brief: finding and figures first; the tables are folded.
    """
    environment = Environment(
        loader=PackageLoader("unisd.compare"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": _percent, "points": _points, "number": number, "signed": _signed, "energy": _energy
    }  # fmt: skip
    content = {
        "title": title,
        "notes": notes,
        "facts": facts or {},
        "brief": brief,
        **_content(group_runs(runs, group)),
    }
    html, text = (environment.get_template(name).render(content) for name in ("page.html.j2", "page.md.j2"))
    return html, text


def _content(groups: list[Group]) -> dict[str, Any]:
    runs = [run for group in groups for run in group.runs]
    scores = score_table(groups)
    gains = mean_gain(scores, groups)
    steps = beside.step_tables(groups)
    percents, changes = beside.change_percentiles(groups)
    trained = [run for run in runs if run.settings]
    return {
        "groups": groups,
        "runs": runs,
        "findings": findings(groups, scores),
        "scores": scores,
        "has_second": any(score.second for row in scores.values() for score in row),
        "has_seeds": any(len(group.runs) > 1 for group in groups),
        "gains": gains,
        "behaviour": beside.behaviour_table(groups),
        "limits": LIMITS,
        "steps": steps,
        "first_figures": [*_trade(groups, gains), *_by_steps(groups, steps), *_curves(groups, CURVES)],
        "more_figures": _curves(groups, MORE_CURVES),
        "drift": beside.drift_table(groups),
        "percents": percents,
        "changes": changes,
        "energy_words": beside.energy_words(groups),
        "estimates": [beside.is_estimate(group) for group in groups],
        "statistics": beside.statistics_table(groups),
        "settings": beside.differing_settings(groups),
        "all_settings": dict(trained[0].settings) if len(trained) == 1 else {},
        "completions": completions_side_by_side([group.runs[0] for group in groups]),
    }


def _trade(groups: Sequence[Group], gains: Sequence[Spread | None]) -> list[tuple[figures.Figure, str]]:
    placed = []
    names = _without_what_they_share([group.name for group in groups], [bool(g.runs[0].settings) for g in groups])
    for place, (group, gain) in enumerate(zip(groups, gains, strict=True)):
        drift = group.spread(_drift)
        if gain is not None and drift is not None:
            x, y = (Ranged(each.value * k, each.low * k, each.high * k) for each, k in ((drift, 1), (gain, 100)))
            placed.append((place, names[place], x, y))
    figure = figures.scatter(placed, "KL from the base, nats a token", "mean gain, points")
    return [] if figure is None else [(figure, "Gain against drift: up is better, left is closer to the base.")]


def _by_steps(groups: Sequence[Group], tables: Sequence[beside.Steps]) -> list[tuple[figures.Figure, str]]:
    drawn = []
    for table in tables:
        series = [
            (place, group.name, [(float(steps), 100 * row[steps].value) for steps in table.steps if steps in row])
            for place, (group, row) in enumerate(zip(groups, table.rows, strict=True))
        ]
        label = f"{table.name}: {table.measure} by number of steps, %"
        figure = figures.lines(series, "steps", f"{table.measure}, %", dots=True, share=True)
        drawn += [] if figure is None else [(figure, label)]
        series = [
            (place, group.name, [(float(steps), row[steps].value) for steps in sorted(row)])
            for place, (group, row) in enumerate(zip(groups, table.perplexities, strict=True))
        ]
        figure = figures.lines(series, "steps", "perplexity", dots=True)
        label = f"{table.name}: perplexity of the right reply by number of steps"
        drawn += [] if figure is None else [(figure, label)]
    return drawn


def _curves(groups: Sequence[Group], names: Sequence[tuple[str, str]]) -> list[tuple[figures.Figure, str]]:
    drawn = []
    for name, label in names:
        series = [(place, run.name, run.curve(name)) for place, group in enumerate(groups) for run in group.runs]
        figure = figures.lines(series, "step", label)
        drawn += [] if figure is None else [(figure, label)]
    return drawn


def _without_what_they_share(names: Sequence[str], trained: Sequence[bool]) -> list[str]:
    """Names of trained runs without the words, up to a dash, with which all of them begin ("procedural-plain")."""
    first = {name.partition("-")[0] for name, is_trained in zip(names, trained, strict=True) if is_trained}
    if len(first) != 1 or sum(trained) < 2:
        return list(names)
    return [name.removeprefix(f"{next(iter(first))}-") for name in names]


def _drift(run: Run) -> float | None:
    """A model that was not trained has not moved."""
    return 0.0 if run.drift_kl is None and not run.settings else run.drift_kl


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _signed(value: float) -> str:
    return f"{value:+.3g}"


def _energy(joules: float) -> str:
    """Joules with a unit of a size to read, and watt hours."""
    return f"{joules:.3g} J" if joules < 1000 else f"{joules / 1000:.3g} kJ ({joules / 3600:.3g} Wh)"


def number(value: float | None, digits: int = 3) -> str:
    """For a reader."""
    return "-" if value is None else f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"
