"""Names, numbers and intervals of the study as its page writes them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.report.study_statistics import BASE, Run, mean_of, range_over_seeds, share
from unisd.scoring import Interval

STAR = "unisd_star"
TASKS = {"procedural": "Procedural tasks", "cos_e": "CoS-E"}
IN_TEXT = {"procedural": "procedural tasks", "cos_e": "CoS-E"}
MEASURES = {"procedural": ("accuracy", "answered"), "cos_e": ("strict", "lenient")}
"""Task -> the two that are shown, the one that counts first."""
NAMES = {BASE: "base", "sft": "SFT", "gkd": "GKD", "sdft": "SDFT", STAR: "UniSD*"}
"""Preset -> what it is called; the mechanisms by themselves by their own names."""


def method_name(preset: str) -> str:
    return NAMES.get(preset, f"`{preset}`").replace("*", "\\*")


def shown_share(group: Sequence[Run], task: str, measure: str) -> str:
    text = percent(share(group, task, measure))
    if len(group) == 1:
        return text
    low, high = range_over_seeds(group, task, measure)
    return f"{text} ({100 * low:.0f} to {100 * high:.0f})"


def percent(interval: Interval) -> str:
    return f"{100 * interval.value:.0f}% [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def signed(interval: Interval) -> str:
    if interval.low == interval.high:
        return f"{100 * interval.value:+.0f} (on every item)" if interval.value else "0 (no item differs)"
    text = f"{100 * interval.value:+.0f} [{100 * interval.low:+.0f}, {100 * interval.high:+.0f}]"
    return f"**{text}**" if interval.leaves_out_zero else text


def interval_of(saved: Mapping[str, Any]) -> Interval:
    return Interval(saved["value"], saved["low"], saved["high"], saved["count"])


def perplexity(run: Run) -> float:
    """Perplexity of the right replies to all tasks."""
    return float(run["evaluations"]["procedural"]["overall"]["perplexity"])


def spread(values: Sequence[float], shown: str) -> str:
    text = shown.format(statistics.fmean(values))
    return text if len(values) == 1 else f"{text} ({shown.format(min(values))} to {shown.format(max(values))})"


def listed(things: Sequence[object]) -> str:
    """With "and" before the last; "" for none."""
    *first, last = map(str, things or [""])
    return f"{', '.join(first)} and {last}" if first else last


def mean_share(group: Sequence[Run], task: str, measure: str) -> str:
    return f"{100 * mean_of(group, task, measure):.0f}%"
