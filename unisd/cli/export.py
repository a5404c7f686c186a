"""`unisd export --ema`: the moving-average teacher of a run, as a model or an adapter of its own.

    unisd export --ema runs/mine -o teacher
    unisd export --ema runs/mine/checkpoint-200 -o teacher --merge

The folder is a run's or a checkpoint's. Averages of all weights become a model; those of an adapter's factors an
adapter, or with --merge a model; those of products (ema=merged) a model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from unisd.cli.errors import CommandError, setting_up
from unisd.cli.parser import CommandParser
from unisd.teachers.export import export_teacher


def main(arguments: list[str]) -> int:
    parser = CommandParser(
        prog="unisd export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of a run, or of a checkpoint")
    parser.add_argument("--ema", action="store_true", required=True, help="export the moving average")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--merge", action="store_true", help="an adapter's average as a whole model")
    parser.add_argument("--base", help="the model below the adapter, where the adapter's own note of it does not hold")
    options = parser.parse_args(arguments)
    if options.output.exists():
        raise CommandError(f"{options.output} exists: give another -o FOLDER")
    with setting_up():
        what = export_teacher(options.folder, options.output, merge=options.merge, base=options.base)
    print(f"{what}: {options.output}")
    print(f"next: unisd eval retention --model {options.output}")
    return 0
