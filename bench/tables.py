"""Results as Markdown. `python -m bench.tables FILE`: the tables of a suite's result file, and what was left out."""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.cases import CASES, Case

# The columns of errors: title, field of the row.
ERRORS: dict[str, tuple[tuple[str, str], ...]] = {
    "unisd_loss": (("gradient error", "gradient_error"),),
    "divergence": (("error of D", "value_error"), ("gradient error", "gradient_error")),
    "scoring": (("error of log p", "value_error"),),
}


def heading(case: Case) -> str:
    views = f" K={case.num_auxiliary}" if case.operation == "unisd_loss" else ""
    head = "" if case.operation == "scoring" else f" {'frozen' if case.frozen_head else 'trainable'} head"
    return (
        f"{case.name}: N={case.num_rows} H={case.hidden_size} V={case.vocab_size}{views} "
        f"{str(case.dtype).removeprefix('torch.')}{head}; "
        f"floor = {case.num_products} bare matrix product{'s' if case.num_products > 1 else ''}"
    )


def table(case: Case, rows: list[dict[str, Any]], times: bool = False) -> str:
    """One case. With `times` also milliseconds (median and the 0.2 to 0.8 quantiles) and the note of a contender."""
    errors = ERRORS[case.operation]
    titles = ["divergence", "contender", *(["ms", "p20 to p80"] if times else []), "time / floor", "extra peak memory"]
    titles += [title for title, _ in errors] + (["note"] if times else [])
    lines = [
        heading(case) + (f"; bar {case.bar:g}" if times and case.bar else ""),
        "",
        f"| {' | '.join(titles)} |",
        "|---" * len(titles) + "|",
    ]
    for row in rows:
        note = [row["note"]] if times else []
        if "failure" in row:
            blank = ["" for _ in range(len(titles) - 3 - len(note))]
            # README.md holds such a table: blank cells there are a space wide.
            lines.append(f"| {' | '.join([row['divergence'], row['peer'], row['failure'], *blank, *note])} |")
            continue
        cells = [row["divergence"], row["peer"]]
        if times:
            p20, median, p80 = (1e3 * row[f"{name}_seconds"] for name in ("p20", "median", "p80"))
            cells += [f"{median:.3g}", f"{p20:.3g} to {p80:.3g}"]
        cells.append(f"{row['ratio_to_floor']:.2f}" if "ratio_to_floor" in row else "no floor")
        cells.append(f"{row['extra_peak_bytes'] / 1e6:.0f} MB" if "extra_peak_bytes" in row else "")
        cells += [f"{row[field]:.1e}" if field in row else "" for _, field in errors]
        lines.append(f"| {' | '.join(cells + note)} |")
    return "\n".join(lines)


def report(result: dict[str, Any]) -> str:
    """Every case of a suite's result, then what was left out and why."""
    parts = [
        table(CASES[name], list(rows), times=True) for name, rows in groupby(result["rows"], lambda row: row["case"])
    ]
    left_out = [f"- {entry['case']} ({', '.join(entry['peers'])}): {entry['reason']}" for entry in result["left_out"]]
    parts.append("Left out:\n" + "\n".join(left_out) if left_out else "Left out: nothing.")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("file", type=Path)
    print(report(json.loads(parser.parse_args().file.read_text())))


if __name__ == "__main__":
    main()
