"""Rows of questions and answers given to `unisd train`: prepared with what the preset needs, and kept."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from datasets import Dataset

from unisd.cli.errors import CommandError
from unisd.config import UniSDConfig
from unisd.contexts import LengthLimit
from unisd.contexts.template import TeacherTemplate
from unisd.generation import make_generator
from unisd.models import load_model, weights_stamp
from unisd.prepare.folder import is_prepared, load_prepared, save_prepared
from unisd.prepare.pipeline import prepare
from unisd.prepare.settings import PrepareSettings
from unisd.tasks import Columns
from unisd_kernels.cache import cache_directory
from unisd_kernels.version import __version__

if TYPE_CHECKING:
    from unisd.cli.data import DataArguments


class Lengths(NamedTuple):
    """What decides which rows are too long."""

    tokenizer: Any
    limit: LengthLimit


def prepared_rows(
    raw: Sequence[dict[str, Any]],
    data: DataArguments,
    config: UniSDConfig,
    model: str,
    lengths: Lengths | None = None,
) -> Dataset:
    """The rows with the views that the preset reads.

    Args:
        raw: rows of questions and answers.
        model: writes the negatives: the model before training.
        lengths: to drop what is too long before anything is made of it; None leaves all of it to the trainer.

    Raises:
        CommandError: another process than the first, which has failed.
        ValueError: see `unisd.prepare.pipeline.prepare`.
    """
    settings = settings_of_run(data, config)
    limit = lengths.limit if lengths else None
    folder = cached_folder(raw, settings, model if settings.needs_model else "", data.generator, limit)
    # The others wait for the first process, `ddp_timeout` seconds at most.
    with config.main_process_first(local=False, desc="preparing rows"):
        if is_prepared(folder):
            say(config, f"the rows were prepared before: {folder}")
            return load_prepared(folder)
        if config.process_index > 0:
            raise CommandError(
                f"the first process has not put the prepared rows into {folder}; on several machines, let all share "
                "UNISD_CACHE, or give --dataset a folder of `unisd prepare`"
            )
        rows = _prepare_and_keep(raw, settings, data, config, model, lengths, folder)
        if config.device.type != "cpu":
            torch.accelerator.empty_cache()  # the model that wrote is gone; vLLM counts what is free
        return rows


def _prepare_and_keep(
    raw: Sequence[dict[str, Any]],
    settings: PrepareSettings,
    data: DataArguments,
    config: UniSDConfig,
    model: str,
    lengths: Lengths | None,
    folder: Path,
) -> Dataset:
    made = [f"{settings.num_auxiliary} {settings.contexts} contexts"] if settings.num_auxiliary else []
    made += ["negatives by the model itself"] if settings.negatives == "model" else []
    made += ["negatives from other rows"] if settings.negatives == "other" else []
    say(config, f"preparing {len(raw)} rows" + (f": {' and '.join(made)}" if made else ""))
    loaded, trust = None, config.trust_remote_code
    if settings.needs_model and data.generator == "transformers":
        dtype = "float32" if config.device.type == "cpu" else "auto"
        loaded = load_model(model, dtype=dtype, device=config.device, trust_remote_code=trust)
    chats = loaded is None or loaded[1].chat_template is not None
    prepared = prepare(
        raw,
        settings,
        generator=lambda: make_generator(data.generator, model, loaded=loaded, trust_remote_code=trust),
        chats=chats,
        tokenizer=lengths.tokenizer if lengths else None,
        limit=lengths.limit if lengths else None,
        every_view=False,  # the trainer does
        progress=not config.disable_tqdm,
    )
    for line in prepared.report.lines():
        say(config, line)
    rows = save_prepared(prepared, folder, {"dataset": data.dataset, "model": model})
    say(config, f"kept for the next run: {folder} (unisd show {folder} --row 0)")
    return rows


def settings_of_run(data: DataArguments, config: UniSDConfig) -> PrepareSettings:
    """What the preset, as it was configured, needs of each row."""
    return PrepareSettings(
        contexts=data.contexts,
        negatives=data.negatives if config.reads_negative and not config.is_supervised else "none",
        num_auxiliary=config.num_auxiliary if config.reads_auxiliary and not config.is_supervised else 0,
        demos_per_context=data.demos_per_context,
        context_pool=data.context_pool if config.reads_auxiliary else 0,
        columns=Columns.of(data),
        kind=data.task,
        template=TeacherTemplate.of(config),
        seed=config.seed,
        unsafe_code=data.unsafe_code,
    )


def cached_folder(
    raw: Sequence[dict[str, Any]], settings: PrepareSettings, model: str, generator: str, limit: LengthLimit | None
) -> Path:
    """Folder of the prepared rows in the user's cache, by all that decides them."""
    parts = [raw, repr(settings), weights_stamp(model), generator, repr(limit), __version__]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]
    return cache_directory() / "prepared" / digest


def say(config: UniSDConfig, line: str) -> None:
    """A line on stderr, of the first process."""
    if config.process_index == 0:
        print(f"unisd train: {line}", file=sys.stderr, flush=True)
