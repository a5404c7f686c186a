"""`unisd presets`: every recipe by name, and what it sets."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import fields

from unisd.cli.errors import CommandError
from unisd.cli.parser import CommandParser, nearest
from unisd.presets import PAPER_LORA, PRESETS, Preset, is_paper, preset_fields, table


def main(arguments: list[str]) -> int:
    parser = CommandParser(
        prog="unisd presets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="show every setting of this one")
    options = parser.parse_args(arguments)
    if options.name is None:
        print(table(shutil.get_terminal_size((80, 24)).columns))
        print("\nunisd presets NAME shows what one sets; unisd train --preset NAME takes it.")
        return 0
    if options.name not in PRESETS:
        raise CommandError(f"there is no preset {options.name!r}{nearest(options.name, PRESETS)}")
    preset, plain = PRESETS[options.name], Preset("")
    print(f"{options.name}: {preset.description}\n")
    for entry in fields(Preset):
        if entry.name in preset_fields():
            value = getattr(preset, entry.name)
            print(f"  {entry.name:<22} {value}{'' if value == getattr(plain, entry.name) else '  *'}")
    if is_paper(options.name):
        for name, value in PAPER_LORA.items():
            print(f"  {name:<22} {', '.join(value) if isinstance(value, list) else value}  *")
        print(f"  {'contexts':<22} retrieval  *\n  {'micro-batch':<22} 16, 8 or 4 by size, halved for UniSD*  *")
    print("\n* differs from plain self-distillation")
    return 0
