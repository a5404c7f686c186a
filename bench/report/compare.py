"""`python -m bench compare A B`: do two results of the same cases agree, ratio by ratio, within their stated spread?

The spread of a ratio is the range of its 0.2 and 0.8 quantiles over the rounds, 10% of the ratio either way at least
(5% on an accelerator); two agree if their ranges meet. Exit status 1 if one pair does not, 2 if there is nothing to
compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.parser import command_parser
from bench.records import results_file
from bench.records.verdict import Row, agree, ratio_range, same_rows
from unisd.cli.errors import CommandError


def comparison(pairs: list[tuple[Row, Row]]) -> str:
    lines = ["| case | divergence | peer | first | second | |", "|---" * 6 + "|"]
    for a, b in pairs:
        cells = [a["case"], a["divergence"], a["peer"]]
        for row in (a, b):
            low, high = ratio_range(row)
            cells.append(f"{row['ratio_to_floor']:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {' | '.join([*cells, 'agree' if agree(a, b) else '**differ**'])} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("compare", __doc__)
    parser.add_argument("files", type=Path, nargs=2)
    first, second = map(results_file.read, parser.parse_args(arguments).files)
    pairs = same_rows(first["rows"], second["rows"])
    if not pairs:
        raise CommandError("the two results have no row with a ratio in common")
    print(comparison(pairs))
    return int(not all(agree(a, b) for a, b in pairs))
