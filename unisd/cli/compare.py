"""`unisd compare RUN ...`: runs side by side, as one page.

    unisd eval cos_e --model runs/a -o runs/a/eval
    unisd eval procedural drift behaviour --model runs/a -o runs/a/eval
    unisd compare runs/base runs/a runs/b -o comparison

Each RUN is a folder of `unisd train` with its evaluations in RUN/eval, or a folder of `unisd eval` alone. The first is
what the others are compared with, item by item. Runs whose settings differ only by the seed are one row, with mean and
range. The folder gets compare.html, which needs nothing else, and compare.md.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from unisd.cli.errors import CommandError, setting_up
from unisd.cli.parser import CommandParser
from unisd.compare import load_run, rendered
from unisd.compare.groups import HOW
from unisd_kernels.files import replacing


def main(arguments: list[str]) -> int:
    parser = CommandParser(prog="unisd compare", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("-o", "--output", type=Path, default=Path("comparison"), help="folder for the page")
    parser.add_argument("--title", default="Runs side by side")
    parser.add_argument(
        "--group",
        choices=HOW,
        default="seed",
        help="runs that are one row with mean and range: settings that differ only by the seed; the same preset; none",
    )
    options = parser.parse_args(arguments)
    with setting_up():
        runs = [load_run(folder) for folder in options.runs]
    twice = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    if twice:
        raise CommandError(f"two runs have the name {twice[0]!r}: rename one of the folders")
    html, markdown = rendered(runs, options.title, group=options.group)
    for name, text in (("compare.html", html), ("compare.md", markdown)):
        with replacing(options.output / name) as new:
            new.write_text(text, encoding="utf-8")
    print(markdown)
    print(f"page: {options.output / 'compare.html'}")
    return 0
