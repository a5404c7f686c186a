"""README.md's tables: the UniSD* loss on every machine's CPU, and the demo before and after. Narrow, for phones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.peers.names import FLOORS
from bench.records import machine
from bench.records.verdict import Row
from bench.report import machine_page
from bench.report.provenance import where

_SHORT = {"float32": "fp32", "bfloat16": "bf16"}
Column = tuple[str, str]
"""(operands, divergence)"""


def loss_tables(folders: Sequence[Path]) -> str:
    """A table of times for each machine; memory and error are of the one measured last, in float32."""
    parts, sources = [], []
    newest: tuple[Mapping[str, Any], dict[Column, dict[str, Row]]] | None = None
    for folder in folders:
        results = [result for name in ("float32", "bfloat16") if (result := machine_page.load(folder, name))]
        found = _by_column(row for result in results for row in result["rows"])
        if not found:
            continue
        sources += [result["environment"] for result in results]
        environment = max((result["environment"] for result in results), key=lambda one: one["date"])
        if newest is None or environment["date"] > newest[0]["date"]:
            newest = environment, found
        counts = sorted({row["num_rows"] for rows in found.values() for row in rows.values()})
        parts.append(f"*{machine.title(environment)}*, N = {', '.join(map(str, counts))}, multiples of the floor:")
        heads = {column: f"{_short(column[1])} {_SHORT[column[0]]}" for column in found}
        parts.append(_table(found, heads, lambda row: f"{row['ratio_to_floor']:.2f}"))
    assert newest is not None
    environment, found = newest
    of_float32 = {column: rows for column, rows in found.items() if column[0] == "float32"}
    parts.append(f"*{machine.title(environment)}*, float32: extra peak memory, and the gradient's relative error:")
    heads = {column: _short(column[1]) for column in of_float32}
    parts.append(
        _table(
            of_float32,
            heads,
            lambda row: f"{row['extra_peak_bytes'] / 1e6:.0f} MB; {_power(row['gradient_error'])}",
        )
    )
    return "\n\n".join([*parts, _folded(list(map(where, sources)))])


def _short(divergence: str) -> str:
    """KL of "forward KL", JSD of "JSD beta=0.5"."""
    return divergence.removeprefix("forward ").partition(" ")[0]


def _power(number: float) -> str:
    """5e-6"""
    digit, _, power = f"{number:.0e}".partition("e")
    return f"{digit}e{int(power)}"


def _by_column(rows: Iterable[Row]) -> dict[Column, dict[str, Row]]:
    """Rows of the loss by operands and divergence, and then by peer; the floors are in docs/benchmarks.md."""
    found: dict[Column, dict[str, Row]] = {}
    for row in rows:
        if row["operation"] == "unisd_loss" and "failure" not in row and row["peer"] not in FLOORS:
            found.setdefault((row["dtype"], row["divergence"]), {})[row["peer"]] = row
    return found


def _table(found: Mapping[Column, Mapping[str, Row]], heads: Mapping[Column, str], cell: Callable[[Row], str]) -> str:
    peers = dict.fromkeys(peer for rows in found.values() for peer in rows)
    lines = [f"| | {' | '.join(heads[column] for column in found)} |", "|---" * (len(found) + 1) + "|"]
    for peer in peers:
        cells = [cell(rows[peer]) if peer in rows else "" for rows in found.values()]
        lines.append(f"| {peer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _folded(paragraphs: Sequence[str]) -> str:
    """Paragraphs that a page shows when asked to."""
    return "\n\n".join(["<details><summary>Commands, machines, versions</summary>", *paragraphs, "</details>"])


def demo_table(result: Mapping[str, Any]) -> str:
    """Before and after the demo, a line for each seed."""
    lines = [
        "| seed | perplexity of the correct reply | accuracy | KL from the base on chat, nats a token | minutes |",
        "|---" * 5 + "|",
    ]
    for run in result["runs"]:
        before, after = run["before"], run["after"]
        lines.append(
            f"| {run['seed']} | {before['perplexity']:.3f} -> {after['perplexity']:.3f} "
            f"| {before['accuracy']:.0%} -> {after['accuracy']:.0%} "
            f"| {run['retention']['kl']:.3f} | {run['minutes']:.1f} |"
        )
    return "\n".join(lines)
