"""Parser of one command, whose description is its module's docstring."""

from __future__ import annotations

from pathlib import Path

import torch

from unisd.cli.parser import CommandParser


def command_parser(name: str, description: str | None) -> CommandParser:
    return CommandParser(prog=f"python -m bench {name}", description=description)


def gpu_command_parser(name: str, description: str | None) -> CommandParser:
    """Parser of a command that measures on a GPU and can print what it measured before."""
    parser = command_parser(name, description)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--report", type=Path, help="print the table of an earlier --output")
    parser.add_argument("--output", type=Path, help="JSON file for everything; the table goes to standard output")
    return parser


def cuda_device(parser: CommandParser, name: str, what: str) -> torch.device:
    """The device of --device, on which `what` is timed; ends the command where it is no CUDA device of this machine."""
    device = torch.device(name)
    if device.type != "cuda" or not torch.cuda.is_available():
        parser.error(f"--device {device}: {what} are timed on a CUDA device, and there is none here")
    return device
