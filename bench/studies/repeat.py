"""`python -m bench repeat --run 1`, an hour later `--run 2`: do the same figures come out again?

The spread was fixed on 2026-11-26, before either run was made, and no run may move it: of two medians of the same
figure the larger exceeds the smaller by at most

    time / floor           10%
    share of the FMA peak  10%
    extra peak memory      10%, or 8 MB
    error against float64  10%, or 1e-7

`--run 2` compares with the first and prints for every figure whether it is within or without; exit status 1 where one
is without. `--compare A B` compares any two files or folders of results, and measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.measuring import run as run_command
from bench.parser import command_parser
from bench.peers import FLOOR_FLOAT32, OURS, PEAK
from bench.report.spread import compared
from bench.studies.figures import folder_here
from unisd.cli.errors import CommandError

CASES = ("scoring_cpu", "kl_cpu", "unisd_star_cpu", "scoring_cpu_bf16", "kl_cpu_bf16", "unisd_star_cpu_bf16")
PEERS = (OURS, FLOOR_FLOAT32, PEAK, "dense float32", "dense float32 compiled")
WORDS = ("--device", "cpu", "--case", *CASES, "--beta", "0", "--rounds", "9", "--peer-rounds", "5", "--peers", *PEERS)
MINUTES = 4


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("repeat", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=int, choices=(1, 2), help=f"measure, about {MINUTES} minutes; 2 compares with 1")
    what.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two files or folders of results")
    options = parser.parse_args(arguments)
    if options.compare:
        return compared(*options.compare)
    folder = folder_here()
    first, second = (folder / f"run_{number}.json" for number in (1, 2))
    if options.run == 2 and not first.exists():
        raise CommandError(f"there is no first run: {first} is made by python -m bench repeat --run 1")
    print(f"about {MINUTES} minutes", flush=True)
    status = run_command.main([*WORDS, "--output", str(first if options.run == 1 else second)])
    return max(status, compared(first, second)) if options.run == 2 else status
