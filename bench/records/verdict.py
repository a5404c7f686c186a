"""Verdicts on a result: what is wrong, what misses its bar, what became slower than a kept result.

Wrong: a peer's error against float64 is above its limit (`measuring/accuracy.py`). Slow: this package's ratio to the
floor is above the case's bar, or above that of another result by more than both results' spreads allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.peers.names import FLOOR, OURS

Row = Mapping[str, Any]

# The spread of a ratio is this share of it at least. The quantiles of one run know nothing of how a machine drifts from
# one run to the next: a CPU with neighbours did by up to 10% either way within an hour (docs/benchmarks.md).
TOLERANCE, TOLERANCE_ON_CPU = 0.05, 0.10
_ERRORS = ("value_error", "gradient_error")


def on_cpu(row: Row) -> bool:
    """Whether it was measured on one; rows of before they said so are an accelerator's where they are 16-bit."""
    return row.get("device_type", "cpu" if row["dtype"] == "float32" else "cuda") == "cpu"


def is_wrong(row: Row) -> bool:
    return bool(_wrong_errors(row))


def _wrong_errors(row: Row) -> list[str]:
    """Fields above their limits; an error that is not a number is wrong too."""
    return [name for name in _ERRORS if f"{name}_limit" in row and not row[name] <= row[f"{name}_limit"]]


def under_peak_bar(row: Row) -> bool:
    return "peak_bar" in row and row.get("share_of_peak", 1.0) < row["peak_bar"]


def over_bar(row: Row) -> bool:
    return "bar" in row and "ratio_to_floor" in row and row["ratio_to_floor"] > row["bar"]


def ratio_range(row: Row) -> tuple[float, float]:
    """The stated spread of a ratio: the 0.2 and 0.8 quantiles of its rounds, and the tolerance at least."""
    ratio = row["ratio_to_floor"]
    tolerance = TOLERANCE_ON_CPU if on_cpu(row) else TOLERANCE
    return min(row["ratio_p20"], ratio * (1 - tolerance)), max(row["ratio_p80"], ratio * (1 + tolerance))


def agree(a: Row, b: Row) -> bool:
    """The ranges of the two ratios meet."""
    (a_low, a_high), (b_low, b_high) = ratio_range(a), ratio_range(b)
    return a_low <= b_high and b_low <= a_high


def slower(now: Row, before: Row) -> bool:
    return not agree(now, before) and now["ratio_to_floor"] > before["ratio_to_floor"]


def same_rows(rows: Sequence[Row], others: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The rows of both that have a ratio, by case, divergence and peer; the floor's is 1 in any run."""

    def by_key(group: Sequence[Row]) -> dict[tuple[str, str, str], Row]:
        return {
            (row["case"], row["divergence"], row["peer"]): row
            for row in group
            if "ratio_to_floor" in row and row["peer"] != FLOOR
        }

    left, right = by_key(rows), by_key(others)
    return [(row, right[key]) for key, row in left.items() if key in right]


def wrong(rows: Sequence[Row]) -> list[str]:
    """This package's rows that are wrong or have no figure; a peer's error is its own."""
    found = []
    for row in rows:
        if row["peer"] in (FLOOR, OURS) and "failure" in row:
            found.append(f"{_name(row)}: {row['failure']}")
        elif row["peer"] == OURS and is_wrong(row):
            found.append(f"{_name(row)}: wrong, {errors_text(row)}")
    return found


def slow(rows: Sequence[Row], before: Sequence[Row] = ()) -> list[str]:
    ours = [row for row in rows if row["peer"] == OURS]
    found = [
        f"{_name(row)}: {row['ratio_to_floor']:.2f} of the floor, the bar is {row['bar']:g}"
        for row in ours
        if over_bar(row)
    ]
    found += [
        f"{_name(row)}: {row['share_of_peak']:.0%} of the FMA peak, the bar is {row['peak_bar']:.0%}"
        for row in ours
        if under_peak_bar(row)
    ]
    for now, then in same_rows(ours, before):
        if slower(now, then):
            low, high = ratio_range(then)
            found.append(f"{_name(now)}: {now['ratio_to_floor']:.2f} of the floor, before {low:.2f} to {high:.2f}")
    return found


def _name(row: Row) -> str:
    return f"{row['case']}, {row['divergence']}, {row['peer']}"


def errors_text(row: Row) -> str:
    """Errors of a wrong row that are above their limits."""
    return " and ".join(
        f"{name.replace('_', ' ')} {row[name]:.1e}, at most {row[f'{name}_limit']:.1e}" for name in _wrong_errors(row)
    )
