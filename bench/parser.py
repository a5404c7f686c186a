"""Parser of one command, whose description is its module's docstring."""

from __future__ import annotations

import argparse

from unisd.cli.parser import CommandParser


def command_parser(name: str, description: str | None) -> CommandParser:
    return CommandParser(
        prog=f"python -m bench {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
