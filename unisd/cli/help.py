"""Help of the commands: paragraphs as wide as the terminal, examples as they stand, one spelling of each flag."""

from __future__ import annotations

import argparse
import copy
import shutil
import textwrap


def width() -> int:
    """Columns of the terminal, as argparse takes them."""
    return shutil.get_terminal_size().columns - 2


def filled(text: str, columns: int) -> str:
    """The text with every paragraph filled to the columns; indented ones, which are examples, stay."""
    paragraphs = text.strip("\n").split("\n\n")
    return "\n\n".join(
        paragraph if paragraph.startswith(" ") else wrapped(" ".join(paragraph.split()), columns)
        for paragraph in paragraphs
    )


def wrapped(text: str, columns: int, head: str = "") -> str:
    """A paragraph behind `head`, under which its other lines are indented; a flag is not cut at its hyphens."""
    others = " " * len(head)
    return textwrap.fill(text, columns, initial_indent=head, subsequent_indent=others, break_on_hyphens=False)


class CommandHelp(argparse.RawDescriptionHelpFormatter):
    """For descriptions that are docstrings."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return filled(text, width)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # --flag_name and --flag-name are one.
        spellings = {option.replace("-", "_"): option for option in reversed(action.option_strings)}
        action = copy.copy(action)
        action.option_strings = [option for option in action.option_strings if option in spellings.values()]
        return super()._format_action_invocation(action)


class SettingsHelp(CommandHelp, argparse.ArgumentDefaultsHelpFormatter):
    """The same, with the default of every setting."""
