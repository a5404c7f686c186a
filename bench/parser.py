"""Parser of one command, whose description is its module's docstring."""

from __future__ import annotations

import argparse
from pathlib import Path

from unisd.cli.parser import CommandParser


def command_parser(name: str, description: str | None) -> CommandParser:
    return CommandParser(
        prog=f"python -m bench {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def gpu_command_parser(name: str, description: str | None) -> CommandParser:
    """Parser of a command that measures on a GPU and can print what it measured before."""
    parser = command_parser(name, description)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--report", type=Path, help="print the table of an earlier --output")
    parser.add_argument("--output", type=Path, help="JSON file for everything; the table goes to standard output")
    return parser
