"""The comparison as one HTML page that needs nothing else, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from unisd.compare import figures
from unisd.compare.runs import Run, differing_settings
from unisd.compare.tables import completions_side_by_side, mean_gain, score_table
from unisd.drift.schedule import NAME as DRIFT

CURVES = (
    ("loss", "loss"),
    (DRIFT, "KL from the base, nats a token"),
    ("unisd/divergence", "divergence, nats a token"),
    ("unisd/agreement_weight", "mean agreement weight"),
    ("unisd/contrastive", "contrastive term"),
    ("completions/mean_length", "tokens a completion"),
    ("unisd/student_entropy", "entropy of the student, nats"),
)
"""Logged number -> what it is, of the curves that are drawn where a run has them."""


def page(runs: Sequence[Run], title: str) -> str:
    """The page of some runs; the first is what the others are compared with."""
    return rendered(runs, title)[0]


def rendered(runs: Sequence[Run], title: str) -> tuple[str, str]:
    """The page, and its tables as Markdown."""
    environment = Environment(
        loader=PackageLoader("unisd.compare"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": _percent, "points": _points, "number": _number}
    content = {"title": title, **_content(list(runs))}
    html, text = (environment.get_template(name).render(content) for name in ("page.html.j2", "page.md.j2"))
    return html, text


def _content(runs: list[Run]) -> dict[str, Any]:
    scores = score_table(runs)
    gains = mean_gain(scores, len(runs))
    placed = [
        (run.name, drift, 100 * gain)
        for run, gain in zip(runs, gains, strict=True)
        if gain is not None and (drift := _drift(run)) is not None
    ]
    curves = [
        (label, Markup(figures.lines([(run.name, run.curve(name)) for run in runs], "step", label)))
        for name, label in CURVES
    ]
    return {
        "runs": runs,
        "scores": scores,
        "has_second": any(score.second for row in scores.values() for score in row),
        "gains": gains,
        "trade": Markup(figures.scatter(placed, "KL from the base, nats a token", "gain, points")),
        "curves": [(label, svg) for label, svg in curves if svg],
        "settings": differing_settings(runs),
        "completions": completions_side_by_side(runs),
    }


def _drift(run: Run) -> float | None:
    """A model that was not trained has not moved."""
    return 0.0 if run.drift_kl is None and not run.settings else run.drift_kl


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"
