"""`python -m bench.compare A B`: do two results of the same cases agree, ratio by ratio, within their stated spread?

The spread of a ratio is the range of its 0.2 and 0.8 quantiles over the rounds, 10% of the ratio either way at least
(5% on an accelerator); two agree if their ranges meet. Exit status 1 if one pair does not, 2 if there is nothing to
compare.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench.verdict import Row, agree, ratio_range, same_rows


def comparison(pairs: list[tuple[Row, Row]]) -> str:
    lines = ["| case | divergence | contender | first | second | |", "|---" * 6 + "|"]
    for a, b in pairs:
        cells = [a["case"], a["divergence"], a["peer"]]
        for row in (a, b):
            low, high = ratio_range(row)
            cells.append(f"{row['ratio_to_floor']:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {' | '.join([*cells, 'agree' if agree(a, b) else '**differ**'])} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("files", type=Path, nargs=2)
    first, second = (json.loads(file.read_text()) for file in parser.parse_args().files)
    pairs = same_rows(first["rows"], second["rows"])
    if not pairs:
        print("the two results have no row with a ratio in common", file=sys.stderr)
        return 2
    print(comparison(pairs))
    return int(not all(agree(a, b) for a, b in pairs))


if __name__ == "__main__":
    sys.exit(main())
