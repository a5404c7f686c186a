"""`unisd export`: a checkpoint of a run as a model for others.

    unisd export runs/a --ema -o teacher          # the average, as it is
    unisd export runs/a --ema --merge -o teacher  # added to its base
    unisd export runs/a/checkpoint-100 --merge -o student

Of a run its newest weights are taken. Without --ema it is the student.
The average of ema=merged is always a whole model.
"""

from __future__ import annotations

from pathlib import Path

from unisd.cli.errors import setting_up
from unisd.cli.parser import CommandParser
from unisd.run.export import describe, export_model


def main(arguments: list[str]) -> int:
    parser = CommandParser(prog="unisd export", description=__doc__)
    parser.add_argument("source", type=Path, help="folder of a run, or of one of its checkpoints")
    parser.add_argument("-o", "--output", type=Path, required=True, help="new folder for the model")
    parser.add_argument("--ema", action="store_true", help="the moving-average teacher instead of the student")
    parser.add_argument("--merge", action="store_true", help="add an adapter to its base: a model of its own")
    parser.add_argument("--base", help="the model below an adapter, where the adapter's own note of it does not hold")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of a whole model's weights; auto: as they were saved",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    options = parser.parse_args(arguments)
    with setting_up():
        exported = export_model(
            options.source,
            options.output,
            ema=options.ema,
            merge=options.merge,
            base=options.base,
            dtype=options.dtype,
            trust_remote_code=options.trust_remote_code,
        )
    print(describe(exported))
    return 0
