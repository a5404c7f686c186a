"""The one table of a sweep: over the seeds of each preset on each source of rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unisd.compare.groups import spread
from unisd.compare.runs import Run, load_run
from unisd.sweep.cells import Cell, finished


def table(cells: Sequence[Cell], output: Path) -> str:
    """Markdown: mean over seeds and, for more than one, the least and the most. Only runs that are finished count."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for cell in cells:
        runs = groups.setdefault((Path(cell.data).stem, cell.preset), [])
        if finished(output / cell.name) is not None:
            runs.append(load_run(output / cell.name))
    names = list(dict.fromkeys(name for runs in groups.values() for run in runs for name in run.benchmarks))
    head = ["data", "preset", "seeds", *names, "KL from the base, nats a token", "training, s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (data, preset), runs in groups.items():
        scores = [[_share(run, name) for run in runs] for name in names]
        row = [data, preset, str(len(runs)), *(_spread(values, 100, "%") for values in scores)]
        row += [_spread([run.drift_kl for run in runs]), _spread([run.seconds for run in runs])]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _share(run: Run, name: str) -> float | None:
    found = run.benchmarks.get(name)
    score = None if found is None else found.score
    return None if score is None else score["value"]


def _spread(values: Sequence[float | None], times: float = 1, unit: str = "") -> str:
    found = spread(values)
    if found is None:
        return "-"
    mean = f"{times * found.value:.3g}{unit}"
    return mean if found.count == 1 else f"{mean} ({times * found.low:.3g} to {times * found.high:.3g})"
