"""Parsers whose errors are one line, with the flag that was probably meant; `--config` files are checked like flags."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from unisd.cli.errors import CommandError
from unisd.cli.help import CommandHelp


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `CommandError` instead of printing its usage, and takes no abbreviations: a
    prefix of a flag may be another flag tomorrow."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", CommandHelp)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise CommandError; argparse calls this."""
        raise CommandError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse as `ArgumentParser` does, but tell of a misspelt flag before what its value was taken for."""
        arguments = sys.argv[1:] if args is None else list(args)
        refuse_unknown(self, [argument for argument in arguments if self._is_unknown_flag(argument)])
        return super().parse_known_args(arguments, namespace)

    def _is_unknown_flag(self, argument: str) -> bool:
        return argument.startswith("--") and argument.partition("=")[0] not in (*self._option_string_actions, "--")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = [str(choice) for choice in action.choices or ()]
        if choices and str(value) not in choices:
            likely = nearest(str(value), choices)
            known = f"there is no {value!r}{likely}" if likely else f"{value!r} is not one of {', '.join(choices)}"
            raise argparse.ArgumentError(action, known)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse as `ArgumentParser` does."""
        parsed, unknown = self.parse_known_args(args, namespace)
        refuse_unknown(self, unknown)
        return parsed


def refuse_unknown(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
    """Raise CommandError on arguments that no action took, with the nearest flag."""
    flags = [argument.partition("=")[0] for argument in unknown if argument.startswith("-")]
    if flags:
        known = [option for action in parser._actions for option in action.option_strings]
        raise CommandError(f"there is no {flags[0]}{nearest(flags[0], known)}")
    if unknown:
        raise CommandError(f"{unknown[0]!r} belongs to no flag")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence that suggests the names nearest to `name`; empty where none is near."""
    # Flags exist with underscores and with dashes; one of the two is enough.
    spelling = {option.replace("-", "_"): option for option in sorted(known)}
    close = difflib.get_close_matches(name.replace("-", "_"), spelling, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(spelling[option] for option in close)}?" if close else ""


def positive(text: str) -> int:
    """Type of an argument: a whole number above 0."""
    return _at_least(text, 1)


def natural(text: str) -> int:
    """Type of an argument: a whole number from 0."""
    return _at_least(text, 0)


def positive_number(text: str) -> float:
    """Type of an argument: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def add_generator(parser: argparse._ActionsContainer) -> None:
    """The arguments that say who writes replies."""
    parser.add_argument("--generator", default="transformers", help="transformers, vllm, or the URL of a server")
    parser.add_argument(
        "--generator_options",
        type=named_values,
        metavar="JSON",
        help="for --generator vllm: arguments of vllm.LLM, such as '{\"max_model_len\": 4096}'",
    )


def named_values(text: str) -> dict[str, Any]:
    """Type of an argument: a JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'must be a JSON object such as {{"max_model_len": 4096}}, got {text!r}')
    return value


def _at_least(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be a whole number >= {least}, got {text!r}")
    return value
