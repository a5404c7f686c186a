"""Whether two results of the same figures agree within a spread that was fixed before they were measured.

Fixed on 2026-11-26; no run may move it. Two medians of a figure agree where the larger exceeds the smaller by at most
what `SPREADS` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.peers.names import FLOOR
from bench.records import results_file
from bench.records.verdict import Row
from bench.report.provenance import where
from unisd.cli.errors import CommandError

FIXED_ON = "2026-11-26"


class Spread(NamedTuple):
    """How far two of a figure may be apart: by a share of the smaller one, or by an amount; the wider holds."""

    field: str
    title: str
    share: float
    amount: float
    form: str
    scale: float = 1.0


SPREADS = (
    Spread("ratio_to_floor", "time / floor", 0.10, 0.0, ".2f"),
    Spread("share_of_peak", "share of the FMA peak", 0.10, 0.0, ".0%"),
    Spread("extra_peak_bytes", "extra peak memory, MB", 0.10, 8e6, ".0f", 1e-6),
    Spread("value_error", "error of the value", 0.10, 1e-7, ".1e"),
    Spread("gradient_error", "error of the gradient", 0.10, 1e-7, ".1e"),
)


class Pair(NamedTuple):
    """The same figure of two runs."""

    name: str
    spread: Spread
    first: float
    second: float

    @property
    def within(self) -> bool:
        low, high = sorted((self.first, self.second))
        return high - low <= max(self.spread.share * low, self.spread.amount)


def pairs(first: Sequence[Row], second: Sequence[Row]) -> Iterator[Pair]:
    """Every figure that both runs have; the floor's own ratio is 1 in any run."""

    def by_key(rows: Sequence[Row]) -> dict[tuple[Any, ...], Row]:
        fields = ("case", "divergence", "peer", "threads", "cores")
        return {tuple(row.get(field) for field in fields): row for row in rows}

    others = by_key(second)
    for key, row in by_key(first).items():
        for spread in SPREADS:
            of_floor = spread.field == "ratio_to_floor" and row["peer"] == FLOOR
            if key in others and not of_floor and all(spread.field in each for each in (row, others[key])):
                name = ", ".join(str(part) for part in key if part is not None)
                yield Pair(name, spread, row[spread.field], others[key][spread.field])


def table(found: Sequence[Pair]) -> str:
    lines = ["| figure | | first | second | apart | |", "|---" * 6 + "|"]
    for pair in found:
        low, high = sorted((pair.first, pair.second))
        cells = [f"{pair.spread.scale * value:{pair.spread.form}}" for value in (pair.first, pair.second)]
        apart = f"{high / low - 1:.0%}" if low > 0 else ""
        verdict = "within" if pair.within else "**without**"
        lines.append(f"| {' | '.join([pair.name, pair.spread.title, *cells, apart, verdict])} |")
    return "\n".join(lines)


def summary(found: Sequence[Pair]) -> str:
    """How many of each figure are within."""
    parts = []
    for spread in SPREADS:
        own = [pair for pair in found if pair.spread == spread]
        if own:
            parts.append(f"{spread.title} {sum(pair.within for pair in own)} of {len(own)}")
    return f"Within the spread: {'; '.join(parts)}."


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What else than the hour differs between two environments."""
    names = ("cpu", "processor", "products", "threads", "versions", "commit")
    return [name for name in names if first.get(name) != second.get(name)]


def page_section(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """docs/benchmarks.md: two runs of one machine."""
    found = list(pairs(first["rows"], second["rows"]))
    ended = [result["environment"]["date"][:16].replace("T", " ") for result in (first, second)]
    beforehand = "before either run" if min(ended)[:10] >= FIXED_ON else "after these runs, which could not know it"
    differing = differences(first["environment"], second["environment"])
    parts = [
        f"The same command twice, ended {ended[0]} and {ended[1]} UTC. The spread, fixed on {FIXED_ON}, {beforehand}: "
        "of two medians the larger exceeds the smaller by at most 10% (or 8 MB of memory, 1e-7 of an error). "
        f"{summary(found)}{' Between the two also differ: ' + ', '.join(differing) + '.' if differing else ''}",
        table([pair for pair in found if pair.spread.field == "ratio_to_floor" or not pair.within]),
        "Not in the table: the other figures that are within.",
    ]
    return "\n\n".join(parts)


def files_of(path: Path) -> dict[str, Path]:
    """Result files by name: one, or those of a folder."""
    return {each.stem: each for each in sorted(path.glob("*.json"))} if path.is_dir() else {"": path}


def compared(first: Path, second: Path) -> int:
    """Print every figure of two files or folders; 1 where one is without its spread."""
    one, other = files_of(first), files_of(second)
    found: list[Pair] = []
    for name in one.keys() & other.keys():
        a, b = (results_file.read(files[name]) for files in (one, other))
        found += [pair for key in ("rows", "threads", "small") for pair in pairs(a.get(key, ()), b.get(key, ()))]
        differing = differences(a["environment"], b["environment"])
        if differing:
            print(f"{name or second.name}: between the two also differ: {', '.join(differing)}")
        print(f"{name or second.name}: {where(b['environment'])}\n")
    if not found:
        raise CommandError(f"{first} and {second} have no figure in common")
    print(f"{table(found)}\n\n{summary(found)}")
    return int(not all(pair.within for pair in found))
