"""Sources of the rows of `unisd train`: generated, a file, or a dataset of the hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from unisd.cli.errors import CommandError
from unisd.config import UniSDConfig
from unisd.data.procedural import procedural_dataset

_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class DataArguments:
    """Settings of the source of the rows. Their columns are described in `unisd.contexts`."""

    dataset: str = field(
        default="procedural",
        metadata={"help": "'procedural' (generated), a .json/.jsonl/.parquet/.csv file, or a dataset id of the hub."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split to train on; a file has none."})
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Split of `dataset` to evaluate on (a file has none: see eval_file); None for no evaluation."
        },
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "A .json/.jsonl/.parquet/.csv file with the rows to evaluate on."}
    )
    procedural_rows: int = field(default=512, metadata={"help": "Rows to generate for 'procedural'."})
    procedural_steps: list[int] = field(
        default_factory=lambda: [1, 2, 3], metadata={"help": "Numbers of steps, which rows take in turn."}
    )
    procedural_look_back: int = field(default=1, metadata={"help": "How many steps back an operand may lie."})


def check_data(data: DataArguments, config: UniSDConfig) -> None:
    """Raise CommandError for a source that does not exist, and for a split or a file that would not be read."""
    if data.dataset != "procedural" and _is_file(data.dataset):
        _check_file("dataset", data.dataset)
        if data.train_split != "train":
            raise CommandError(f"train_split={data.train_split}: a file has no splits; give the file to train on")
        if data.eval_split is not None:
            raise CommandError(
                f"eval_split={data.eval_split}: the file {data.dataset} has no splits; give the rows to evaluate on as "
                "--eval_file FILE"
            )
    if data.dataset_config is not None and (data.dataset == "procedural" or _is_file(data.dataset)):
        raise CommandError(f"dataset_config={data.dataset_config} has no effect without a dataset of the hub")
    if data.eval_file is not None:
        _check_file("eval_file", data.eval_file)
        if data.eval_split is not None:
            raise CommandError("eval_split and eval_file exclude each other")
    if not has_evaluation(data):
        wanting = "eval_on_start" if config.eval_on_start else None
        if config.eval_strategy != "no":
            wanting = f"eval_strategy={getattr(config.eval_strategy, 'value', config.eval_strategy)}"
        if wanting:
            raise CommandError(f"{wanting} needs rows to evaluate on: give --eval_split or --eval_file")


def has_evaluation(data: DataArguments) -> bool:
    """Whether rows to evaluate on were asked for."""
    return data.eval_split is not None or data.eval_file is not None


def training_rows(data: DataArguments, config: UniSDConfig) -> Dataset:
    """The rows to train on."""
    return _rows(data, data.train_split, config)


def evaluation_rows(data: DataArguments, config: UniSDConfig) -> Dataset | None:
    """The rows to evaluate on, if any."""
    if data.eval_file is not None:
        return _of_file(data.eval_file)
    return None if data.eval_split is None else _rows(data, data.eval_split, config)


def _rows(data: DataArguments, split: str, config: UniSDConfig) -> Any:
    if data.dataset == "procedural":
        return procedural_dataset(
            data.procedural_rows,
            seed=config.seed,
            split=split,
            num_steps=data.procedural_steps,
            look_back=data.procedural_look_back,
            num_auxiliary=config.num_auxiliary,
        )
    if _is_file(data.dataset):
        return _of_file(data.dataset)
    return load_dataset(data.dataset, data.dataset_config, split=split)


def _of_file(file: str) -> Any:
    path = Path(file).expanduser()
    return load_dataset(_FORMATS[path.suffix.lower()], data_files=str(path), split="train")


def _is_file(source: str) -> bool:
    path = Path(source).expanduser()
    return path.suffix.lower() in _FORMATS or path.is_file()


def _check_file(name: str, file: str) -> None:
    path = Path(file).expanduser()
    if path.suffix.lower() not in _FORMATS:
        raise CommandError(f"{name}={file} is not one of {', '.join(_FORMATS)}")
    if not path.is_file():
        raise CommandError(f"{name}={file}: there is no such file")
