"""Resolved settings of a run, in its folder: YAML that `unisd train --config` accepts."""

from __future__ import annotations

import dataclasses
import os
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from unisd_kernels.files import replacing

FILE_NAME = "unisd_config.yaml"

# What belongs to one invocation (a copy of the run must not resume from, or write over, this one), what is derived from
# other settings or set by the launcher, and a secret.
_LEFT_OUT = (
    "do_eval",
    "do_predict",
    "do_train",
    "hub_token",
    "local_rank",
    "overwrite_output_dir",
    "parallelism_config",
    "resume",
    "resume_from_checkpoint",
)
# Two names of one setting, of which the new one wins. Kept is the old one, so that either beats the file.
_NEW_NAMES = ("activation_checkpointing", "activation_checkpointing_kwargs")


def resolved_settings(*instances: Any) -> dict[str, Any]:
    """Settings of some dataclasses by name, as plain values.

    Args:
        instances: built dataclasses, such as a `UniSDConfig`.
    """
    settings: dict[str, Any] = {}
    for instance in instances:
        for field in dataclasses.fields(instance):
            if field.init and field.name not in (*_LEFT_OUT, *_NEW_NAMES):
                settings[field.name] = _plain(getattr(instance, field.name))
    # They set torch_compile where they are None and it is not.
    return settings


def write_settings(folder: str | os.PathLike[str], settings: dict[str, Any]) -> Path:
    """Write `unisd_config.yaml` into `folder` and return its path."""
    path = Path(folder) / FILE_NAME
    head = "# The resolved settings of this run. Again, elsewhere: unisd train --config FILE --output_dir FOLDER\n"
    with replacing(path) as new:
        new.write_text(head + yaml.safe_dump(settings, sort_keys=True, allow_unicode=True), encoding="utf-8")
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    return str(value)
