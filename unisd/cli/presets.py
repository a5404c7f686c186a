"""`unisd presets`: every recipe by name, and what it sets."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import fields

from unisd.cli.errors import CommandError
from unisd.cli.parser import CommandParser, nearest
from unisd.presets import PAPER_LORA, PRESETS, Preset, is_paper, preset_fields, table


def main(arguments: list[str]) -> int:
    parser = CommandParser(prog="unisd presets", description=__doc__)
    parser.add_argument("name", nargs="?", help="show every setting of this one")
    options = parser.parse_args(arguments)
    if options.name is None:
        print(table(shutil.get_terminal_size((80, 24)).columns))
        print("\nunisd presets NAME shows what one sets; unisd train --preset NAME takes it.")
        return 0
    if options.name not in PRESETS:
        raise CommandError(f"there is no preset {options.name!r}{nearest(options.name, PRESETS)}")
    preset, plain = PRESETS[options.name], Preset("")
    columns = shutil.get_terminal_size((80, 24)).columns
    print(textwrap.fill(f"{options.name}: {preset.description}", columns), end="\n\n")
    for entry in fields(Preset):
        if entry.name in preset_fields():
            value = getattr(preset, entry.name)
            _print(entry.name, value, differs=value != getattr(plain, entry.name))
    if is_paper(options.name):
        for name, value in PAPER_LORA.items():
            _print(name, ", ".join(value) if isinstance(value, list) else value, differs=True)
        _print("contexts", "retrieval", differs=True)
        _print("micro-batch", "16 below 1B parameters, 8 below 5B, else 4; half of it for UniSD*", differs=True)
    print("\n* differs from plain self-distillation")
    return 0


def _print(name: str, value: object, *, differs: bool) -> None:
    width = max(40, shutil.get_terminal_size((80, 24)).columns)
    first, *others = textwrap.wrap(f"{value}{'  *' if differs else ''}", width - 26) or [""]
    print(f"  {name:<22} {first}", *(f"{'':<25}{other}" for other in others), sep="\n")
