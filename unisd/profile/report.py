"""A profile as a table, as a file and as a picture."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from unisd.profile.phases import PHASES, REST, StepProfile
from unisd_kernels.files import replacing

_COLOURS = ("#4e79a7", "#a0cbe8", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#9c755f", "#edc948", "#bab0ac")


def summary(profile: StepProfile) -> list[dict[str, Any]]:
    """A row for each phase that ran: median seconds of a step, share of the step, memory in bytes.

    The first step is left out where there are others: it allocates, and compiles.
    """
    steps = profile.steps[1:] or profile.steps
    seconds = {
        name: statistics.median(step.get(name, 0.0) for step in steps)
        for name in (*PHASES, REST)
        if any(name in step for step in steps)
    }
    total = sum(seconds.values()) or 1.0
    return [
        {"phase": name, "seconds": value, "share": value / total, "bytes": profile.memory.get(name)}
        for name, value in seconds.items()
    ]


def table(profile: StepProfile) -> list[str]:
    """For a terminal."""
    rows = summary(profile)
    total = sum(row["seconds"] for row in rows)
    what = "peak GiB" if profile.device.type == "cuda" else "GiB at end"
    lines = [f"  {'phase':<16} {'s a step':>9} {'share':>6} {what:>11}"]
    for row in rows:
        memory = "" if not row["bytes"] else f"{row['bytes'] / 2**30:.2f}"
        bar = "#" * round(30 * row["share"])
        lines.append(f"  {row['phase']:<16} {row['seconds']:>9.3f} {row['share']:>6.0%} {memory:>11}  {bar}")
    count = max(1, len(profile.steps) - 1)
    return [*lines, f"  {'a step':<16} {total:>9.3f}   (medians over {count} step{'s'[: count != 1]})"]


def write(profile: StepProfile, folder: Path) -> tuple[Path, Path]:
    """Write `profile.json` and `profile.png` into the folder and return their paths."""
    numbers, picture = folder / "profile.json", folder / "profile.png"
    with replacing(numbers) as new:
        content = {"device": str(profile.device), "phases": summary(profile), "steps": profile.steps}
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _draw(summary(profile), picture)
    return numbers, picture


def _draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Bars one below the other, large enough for a phone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.55 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = [row["phase"] for row in rows][::-1]
    seconds = [row["seconds"] for row in rows][::-1]
    colours = [_COLOURS[place % len(_COLOURS)] for place in range(len(rows))][::-1]
    bars = axes.barh(names, seconds, color=colours)
    axes.bar_label(bars, [f"{row['seconds']:.2f} s, {row['share']:.0%}" for row in rows][::-1], padding=4, fontsize=12)
    axes.set_xlim(0, 1.35 * (max(seconds) or 1.0))
    axes.set_title(f"One step: {sum(seconds):.2f} s", fontsize=15, loc="left")
    axes.tick_params(labelsize=13)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("seconds (median)", fontsize=12)
    with replacing(file) as new:
        FigureCanvasAgg(figure).print_png(str(new))
