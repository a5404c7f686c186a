"""Settings of a run from dataclasses, a YAML file and the command line, in rising order of precedence.

The values of a file go through the same converters and choices as flags do, so neither accepts what the other refuses.
"""

from __future__ import annotations

import argparse
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from unisd.cli.errors import CommandError
from unisd.cli.help import SettingsHelp
from unisd.cli.parser import CommandParser, nearest, refuse_unknown

_UNSET = object()
# Of these, a text that is no JSON names a file.
_FILE_OR_JSON = ("accelerator_config", "fsdp_config", "deepspeed")


class SettingsParser(CommandParser, TrlParser):
    """Flags for every field of some dataclasses, and `--config FILE`.

    Args:
        dataclass_types: no two with a field of the same name.
        prog, description: as in `argparse.ArgumentParser`.
    """

    def __init__(self, dataclass_types: Sequence[type], *, prog: str, description: str | None = None) -> None:
        # argparse's own usage would list every setting before a word is said.
        super().__init__(
            dataclass_types,
            prog=prog,
            usage=f"{prog} [--config FILE] [--SETTING VALUE ...]",
            description=description,
            formatter_class=SettingsHelp,
        )
        self.hints: dict[str, Any] = {}
        for dataclass_type in dataclass_types:
            self.hints.update(typing.get_type_hints(dataclass_type))
        self.add_argument("--config", metavar="FILE", help="YAML file with any of these settings; flags beat it")
        self.add_argument("--traceback", action="store_true", help="show where an error comes from")
        self._actions_by_name = {
            action.dest: action for action in self._actions if action.dest in self.hints and action.nargs != 0
        }
        for name, action in self._actions_by_name.items():
            members = _members(self.hints[name])
            if dict in members and str not in members:
                action.type = _json_object

    def parse(self, arguments: Sequence[str], defaults: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Read one instance of each dataclass, and everything that was given by file or flag.

        Args:
            defaults: values that take the place of the dataclasses' own.

        Raises:
            CommandError: an unknown name, or a value that its setting cannot take.
        """
        flags = self._given(arguments)
        file = flags.pop("config", None)
        flags.pop("traceback", None)
        of_file = {} if file is None else self._from_file(Path(file))
        given = {**defaults, **of_file, **flags}
        for name, value in given.items():
            self._check(name, value)
        instances = []
        for dataclass_type in self.dataclass_types:
            names = {field.name for field in fields(dataclass_type) if field.init}  # type: ignore[arg-type]
            instances.append(dataclass_type(**{name: value for name, value in given.items() if name in names}))
        return instances, {name: value for name, value in given.items() if name in flags or name in of_file}

    def peek(self, arguments: Sequence[str]) -> dict[str, Any]:
        """What file and flags give, before anything is built: the defaults of some settings depend on others."""
        flags = self._given(arguments)
        file = flags.pop("config", None)
        return {**({} if file is None else self._from_file(Path(file))), **flags}

    def _given(self, arguments: Sequence[str]) -> dict[str, Any]:
        # argparse fills in the defaults of what the namespace lacks: nothing, so that what was given can be told.
        unset = argparse.Namespace(**{action.dest: _UNSET for action in self._actions})
        parsed, unknown = self.parse_known_args(list(arguments), unset)
        refuse_unknown(self, unknown)
        return {name: value for name, value in vars(parsed).items() if value is not _UNSET}

    def _from_file(self, path: Path) -> dict[str, Any]:
        if not path.is_file():
            raise CommandError(f"--config {path}: there is no such file")
        try:
            settings = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise CommandError(f"--config {path} is not YAML: {error}") from None
        if not isinstance(settings, dict):
            raise CommandError(f"--config {path} must hold `name: value` lines, got {type(settings).__name__}")
        given: dict[str, Any] = {}
        try:
            for name, value in settings.items():
                given.update(self._from_yaml(str(name), value))
        except CommandError as error:
            raise CommandError(f"{path}: {error}") from None
        return given

    def _from_yaml(self, name: str, value: Any) -> dict[str, Any]:
        if name == "env":
            raise CommandError(
                "env: the libraries have read their environment by now; set variables in the shell, before the command"
            )
        action = self._actions_by_name.get(name)
        if action is None:
            raise CommandError(f"there is no setting {name!r}{nearest(name, self._actions_by_name)}")
        members = _members(self.hints[name])
        if value is None:
            if type(None) not in members:
                raise CommandError(f"{name} has no value: give one, or leave the line out")
            return {name: None}
        if isinstance(value, dict):
            if dict not in members:
                raise CommandError(f"{name} cannot be a mapping, got {value!r}")
            return {name: value}
        if isinstance(value, list) and action.nargs != "+":
            if list not in members:
                raise CommandError(f"{name} takes one value, got the list {value!r}")
            return {name: value}
        if isinstance(value, bool) and action.const is True and bool not in members:
            return {name: value}  # a switch that also takes a text
        if isinstance(value, bool) and bool not in members:
            raise CommandError(
                f"{name} cannot be {value!r} (YAML reads yes, no, on and off as truth values: put it in quotes)"
            )
        items = value if isinstance(value, list) else [value]
        if action.nargs == "+" and not items:
            return {name: []}
        texts = [str(item).lower() if isinstance(item, bool) else str(item) for item in items]
        option = action.option_strings[0]
        # `=` for a value that starts with a dash.
        return self._given([f"{option}={texts[0]}"] if len(texts) == 1 else [option, *texts])

    def _check(self, name: str, value: Any) -> None:
        """Refuse what argparse lets through although it cannot be meant."""
        if not isinstance(value, str):
            return
        members = _members(self.hints[name])
        for member in members:
            if isinstance(member, type) and issubclass(member, Enum):
                names = [str(item.value) for item in member]
                if value not in names:
                    close = nearest(value, names) or f"; it is one of {', '.join(names)}"
                    raise CommandError(f"{name} cannot be {value!r}{close}")
        if dict in members:
            if value.lstrip().startswith("{"):
                try:
                    _json_object(value)
                except ValueError as error:
                    raise CommandError(f"{name} is not a JSON object ({error}): {value}") from None
            elif name not in _FILE_OR_JSON:
                raise CommandError(f"{name} must be a JSON object such as '{{\"key\": 1}}', got {value!r}")
            elif not Path(value).expanduser().is_file():
                raise CommandError(f"{name} must be a JSON object or a file, got {value!r}, which is neither")


def _members(hint: Any) -> tuple[Any, ...]:
    """The classes of a type hint: int | None -> (int, NoneType), dict[str, Any] -> (dict,)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(member for part in typing.get_args(hint) for member in _members(part))
    return (typing.get_origin(hint) or hint,)


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    return value


class _UniqueKeys(yaml.SafeLoader):
    """Refuse a setting that stands twice in a file, rather than choose the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
