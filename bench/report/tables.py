"""Results as Markdown. `python -m bench tables FILE`: the tables of a result file, and what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.parser import command_parser
from bench.records import results_file
from bench.records.failures import NOT_OFFERED
from bench.records.verdict import Row, is_wrong, on_cpu, over_bar, under_peak_bar

# The columns of errors: title, field of the row.
ERRORS: dict[str, tuple[tuple[str, str], ...]] = {
    "unisd_loss": (("gradient error", "gradient_error"),),
    "divergence": (("error of D", "value_error"), ("gradient error", "gradient_error")),
    "scoring": (("error of log p", "value_error"),),
}


def tflop_per_s(row: Row) -> float:
    """The floor's FLOPs over the peer's time: what is computed twice does not count."""
    flops = 2 * row["num_products"] * row["num_rows"] * row["hidden_size"] * row["vocab_size"]
    return flops / row["median_seconds"] / 1e12


def heading(row: Row) -> str:
    views = f" K={row['num_auxiliary']}" if row["operation"] == "unisd_loss" else ""
    head = "" if row["operation"] == "scoring" else f" {'frozen' if row['frozen_head'] else 'trainable'} head"
    data = "" if row["data"] == "random" else f", {row['data']}'s hidden states"
    count = row["num_products"]
    return (
        f"{row['case']}: N={row['num_rows']} H={row['hidden_size']} V={row['vocab_size']}{views} "
        f"{row['dtype']}{head}{data}; floor = {count} bare matrix product{'s' if count > 1 else ''}"
    )


def table(rows: Sequence[Row]) -> str:
    """One case. With milliseconds (median and the 0.2 to 0.8 quantiles) on an accelerator: a CPU's say little of
    another's. With the share of the multiply-adds that registers alone can do, where that was measured."""
    first = rows[0]
    times = not on_cpu(first)
    shares = any("share_of_peak" in row for row in rows)
    energy = any(row.get("joules") is not None for row in rows)
    errors = ERRORS[first["operation"]]
    titles = ["divergence", "peer", *(["ms", "p20 to p80"] if times else [])]
    titles += ["time / floor", "p20 to p80", *(["of the FMA peak"] if shares else []), "extra peak memory"]
    titles += [title for title, _ in errors]
    titles += [*(["J"] if energy else []), "note"]
    lines = [heading(first), "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    lacking: dict[str, str] = {}
    for row in rows:
        if str(row.get("failure")).startswith(NOT_OFFERED):
            lacking[row["peer"]] = row["failure"].removeprefix(NOT_OFFERED)
        elif "failure" in row:
            blank = ["" for _ in range(len(titles) - 4)]
            lines.append(f"| {' | '.join([row['divergence'], row['peer'], row['failure'], *blank, row['note']])} |")
        else:
            lines.append(f"| {' | '.join(cells_of(row, times, shares, energy, [field for _, field in errors]))} |")
    if lacking:
        lines += ["", "Not offered: " + "; ".join(lacking.values()) + "."]
    return "\n".join(lines)


def cells_of(row: Row, times: bool, shares: bool, energy: bool, errors: Sequence[str]) -> list[str]:
    cells = [row["divergence"], row["peer"]]
    if times:
        p20, median, p80 = (1e3 * row[f"{name}_seconds"] for name in ("p20", "median", "p80"))
        cells += [f"{median:.3g}", f"{p20:.3g} to {p80:.3g}"]
    cells += ratio_cells(row)
    if shares:
        cells.append(share_cell(row))
    cells.append(f"{row['extra_peak_bytes'] / 1e6:.0f} MB" if "extra_peak_bytes" in row else "")
    cells += [error_cell(row, field) for field in errors]
    if energy:
        cells.append(f"{row['joules']:.3g}" if row.get("joules") is not None else "")
    return [*cells, row["note"]]


def ratio_cells(row: Row) -> list[str]:
    if "ratio_to_floor" not in row:
        return ["no floor", ""]
    ratio = f"{row['ratio_to_floor']:.2f}"
    if "bar" in row:
        ratio += f" ({'over the bar of' if over_bar(row) else 'bar'} {row['bar']:g})"
    return [ratio, f"{row['ratio_p20']:.2f} to {row['ratio_p80']:.2f}"]


def share_cell(row: Row) -> str:
    if "share_of_peak" not in row:
        return ""
    bar = (
        f" ({'under the bar of' if under_peak_bar(row) else 'bar'} {row['peak_bar']:.0%})" if "peak_bar" in row else ""
    )
    return f"{row['share_of_peak']:.0%}{bar}"


def error_cell(row: Row, field: str) -> str:
    if field not in row:
        return ""
    wrong = is_wrong({key: value for key, value in row.items() if key.startswith(field)})
    return f"{row[field]:.1e}" + (f" (limit {row[f'{field}_limit']:.1e})" if wrong else "")


def case_tables(rows: Sequence[Row]) -> list[str]:
    """A table for each case."""
    return [table(list(group)) for _, group in groupby(rows, lambda row: row["case"])]


def report(result: dict[str, Any]) -> str:
    """Every case of a result, then what was left out and why."""
    parts = case_tables(result["rows"])
    entries = [f"- {entry['case']} ({', '.join(entry['peers'])}): {entry['reason']}" for entry in result["left_out"]]
    parts.append("Left out:\n" + "\n".join(entries) if entries else "Left out: nothing.")
    return "\n\n".join(parts)


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("tables", __doc__)
    parser.add_argument("file", type=Path)
    print(report(results_file.read(parser.parse_args(arguments).file)))
    return 0
