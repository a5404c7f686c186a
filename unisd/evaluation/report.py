"""HTML page on a training run: what was run, how training went, what changed.

The page is static, needs no network, and its plots are PNG files beside it; every text that comes from outside is
escaped.
"""

from __future__ import annotations

import html
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from unisd.evaluation.environment import environment
from unisd.evaluation.procedural import ProceduralScores, StepScores
from unisd.evaluation.retention import RetentionScores

# Bookkeeping of the trainer rather than curves of the training.
_NOT_CURVES = {"step", "epoch", "total_flos"}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: 0.8rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: 0.25rem 0.8rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
td.text { text-align: left; white-space: pre-wrap; font-family: ui-monospace, monospace; font-size: 0.85rem; }
pre { background: #f5f5f5; padding: 0.7rem; overflow-x: auto; }
img { max-width: 100%; }
"""


def write_report(
    folder: str | os.PathLike[str],
    *,
    title: str = "UniSD training run",
    history: Sequence[Mapping[str, Any]] = (),
    procedural: Mapping[str, ProceduralScores] | None = None,
    retention: RetentionScores | None = None,
    settings: Mapping[str, Any] | None = None,
    tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    notes: Sequence[str] = (),
    command: str | None = None,
) -> Path:
    """Write `report.html` and its plots into `folder` (made if missing; older files of those names are replaced).

    Args:
        folder: where to write.
        title: heading of the page.
        history: log records of the trainer (`trainer.state.log_history`): dictionaries with `step` and numbers. Each
            quantity logged at two steps or more becomes a curve, the others a table.
        procedural: scores under a label, e.g. `{"before": ..., "after": ...}`; one table, and two plots by number of
            steps.
        retention: trained against base model on held-out chat.
        settings: of the run, listed as they are.
        tables: further tables by heading; each a sequence of rows, columns in the order of the first row's keys.
        notes: paragraphs under the title.
        command: how the run was started; by default this process's command line.

    Returns:
        Path of `report.html`.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    parts = [f"<h1>{_text(title)}</h1>", *(f"<p>{_text(note)}</p>" for note in notes)]
    if procedural:
        parts += _procedural_section(out, procedural)
    if retention is not None:
        parts += _retention_section(retention)
    for heading, rows in (tables or {}).items():
        parts += [f"<h2>{_text(heading)}</h2>", _table(rows)]
    if history:
        parts += _training_section(out, history)
    parts += _run_section(settings or {}, command)
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts)
    )
    path = out / "report.html"
    path.write_text(page + "\n</body>\n</html>\n", encoding="utf-8")
    return path


def curves(history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Points (step, value) of every number logged at two or more steps; infinite and NaN values are left out."""
    series: dict[str, list[tuple[float, float]]] = {}
    for record in history:
        if "step" not in record:
            continue
        for name, value in record.items():
            if name not in _NOT_CURVES and _is_number(value) and math.isfinite(value):
                series.setdefault(name, []).append((float(record["step"]), float(value)))
    return {name: points for name, points in series.items() if len({step for step, _ in points}) >= 2}


def _procedural_section(out: Path, procedural: Mapping[str, ProceduralScores]) -> list[str]:
    rows = []
    lines: dict[int | None, list[tuple[str, StepScores]]] = {}
    for label, scores in procedural.items():
        for one in (*scores.by_steps, scores.overall):
            lines.setdefault(one.num_steps, []).append((label, one))
    for num_steps in sorted(lines, key=lambda steps: (steps is None, steps or 0)):
        for label, one in lines[num_steps]:
            rows.append(
                {
                    "steps": "all" if num_steps is None else num_steps,
                    "model": label,
                    "tasks": one.count,
                    "accuracy": _share(one.accuracy),
                    "answered": _share(one.answered),
                    "perplexity of the correct reply": one.perplexity,
                }
            )
    parts = ["<h2>Procedural execution</h2>", _table(rows)]
    parts += _steps_plot(out / "accuracy.png", procedural, "accuracy", "accuracy of greedy replies")
    parts += _steps_plot(out / "perplexity.png", procedural, "perplexity", "perplexity of the correct reply")
    return parts


def _steps_plot(path: Path, procedural: Mapping[str, ProceduralScores], field: str, label: str) -> list[str]:
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    drawn = False
    for name, scores in procedural.items():
        points = [(one.num_steps, getattr(one, field)) for one in scores.by_steps if getattr(one, field) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=_plain(name))
            drawn = True
    if not drawn:
        return []
    axes.set_xlabel("number of steps")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if field == "accuracy":
        axes.set_ylim(-0.03, 1.03)
    axes.legend()
    return [_save(figure, path, f"{label} by number of steps")]


def _retention_section(retention: RetentionScores) -> list[str]:
    rows = [
        {"": "KL(base || trained), nats a token", "value": retention.kl},
        {"": "perplexity of the answers, base", "value": retention.base_perplexity},
        {"": "perplexity of the answers, trained", "value": retention.trained_perplexity},
        {"": "answer tokens", "value": retention.num_tokens},
    ]
    return ["<h2>Retention on held-out chat</h2>", _table(rows)]


def _training_section(out: Path, history: Sequence[Mapping[str, Any]]) -> list[str]:
    parts = ["<h2>Training</h2>"]
    series = curves(history)
    if series:
        columns = 3
        rows = math.ceil(len(series) / columns)
        figure = Figure(figsize=(11, 2.4 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        flat: list[Axes] = list(grid.flat)
        for axes, (name, points) in zip(flat, series.items(), strict=False):
            axes.plot(*zip(*points, strict=True), linewidth=1.2)
            axes.set_title(_plain(name), fontsize=9)
            axes.tick_params(labelsize=8)
        for axes in flat[len(series) :]:
            axes.set_axis_off()
        parts.append(_save(figure, out / "training.png", "training curves by step"))
    once = {
        name: value
        for record in history
        for name, value in record.items()
        if name not in series and name != "step" and _is_number(value)
    }
    if once:
        parts.append(_table([{"quantity": name, "last value": value} for name, value in once.items()]))
    return parts


def _run_section(settings: Mapping[str, Any], command: str | None) -> list[str]:
    if command is None:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    parts = ["<h2>Run</h2>", f"<pre>{_text(command)}</pre>"]
    if settings:
        parts.append(_table([{"setting": name, "value": value} for name, value in settings.items()]))
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    facts = {"written": now, **environment()}
    parts.append(_table([{"environment": name, "value": value} for name, value in facts.items()]))
    return parts


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "<p>(nothing)</p>"
    columns = list(rows[0])
    lines = ["<table>", "<tr>" + "".join(f"<th>{_text(column)}</th>" for column in columns) + "</tr>"]
    for row in rows:
        lines.append("<tr>" + "".join(_cell(row.get(column)) for column in columns) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _cell(value: Any) -> str:
    if value is None:
        return "<td>-</td>"
    if isinstance(value, float):
        return f"<td>{value:.5g}</td>"
    if isinstance(value, int):
        return f"<td>{value}</td>"
    text = str(value)
    if len(text) <= 12 and "\n" not in text:
        return f"<td>{_text(text)}</td>"
    return f'<td class="text">{_text(text)}</td>'


def _share(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f}%"


def _text(value: object) -> str:
    return html.escape(str(value))


def _plain(name: str) -> str:
    # matplotlib reads text between dollar signs as mathematics, and hides labels that start with an underscore.
    return name.replace("$", r"\$").lstrip("_")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _save(figure: Figure, path: Path, alt: str) -> str:
    FigureCanvasAgg(figure).print_png(path)
    return f'<p><img src="{_text(path.name)}" alt="{_text(alt)}"></p>'
