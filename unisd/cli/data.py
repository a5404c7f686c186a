"""Sources of the rows of `unisd train`: generated, a file, or a dataset of the hub."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from unisd.benchmarks import is_benchmark, rows_to_train_on
from unisd.cli.checks import GENERATED, RAW_ROWS
from unisd.cli.errors import CommandError
from unisd.cli.rows_to_prepare import Lengths, prepared_rows
from unisd.config import UniSDConfig
from unisd.data.diagnostic import DiagnosticSettings, diagnostic_dataset
from unisd.data.procedural import procedural_dataset
from unisd.prepare.folder import is_prepared, load_prepared
from unisd.prepare.sources import FORMATS, format_of, from_hub, is_local, load_rows


@dataclass
class DataArguments:
    """Settings of the source of the rows. Their columns are described in `unisd.contexts`."""

    dataset: str = field(
        default="procedural",
        metadata={
            "help": "'procedural' or 'diagnostic' (generated), a benchmark by name (scienceqa, cos_e, mbpp, ...), a "
            ".json/.jsonl/.parquet/.csv file, a folder (of `unisd prepare`, of `datasets`, of files), or a dataset id "
            "of the hub. Rows of questions and answers are prepared first."
        },
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
    prompt_column: str | None = field(default=None, metadata={"help": "Column of the question; None to find it."})
    answer_column: str | None = field(default=None, metadata={"help": "Column of the answer; None to find it."})
    choices_column: str | None = field(default=None, metadata={"help": "Column of the choices, if there are any."})
    tests_column: str | None = field(default=None, metadata={"help": "Column of the tests of code, if there are any."})
    explanation_column: str | None = field(default=None, metadata={"help": "Column that explains the answer."})
    task: str | None = field(
        default=None, metadata={"help": "Kind of task: open, choice, code or tools; None to tell it from the columns."}
    )
    contexts: str = field(
        default="random", metadata={"help": "Auxiliary contexts that are made: random, retrieval or induction."}
    )
    negatives: str = field(
        default="model", metadata={"help": "Wrong demonstrations that are made: by the model itself, or other."}
    )
    demos_per_context: int = field(default=1, metadata={"help": "Solved examples in each auxiliary context."})
    context_pool: int = field(
        default=0,
        metadata={"help": "Take them from so many fixed sets, computed once between two updates; 0: each row its own."},
    )
    generator: str = field(
        default="transformers", metadata={"help": "What writes negatives: transformers, vllm or the URL of a server."}
    )
    unsafe_code: bool = field(default=False, metadata={"help": "Run a model's code without bubblewrap."})
    procedural_rows: int = field(default=512, metadata={"help": "Rows to generate for 'procedural' or 'diagnostic'."})
    procedural_steps: list[int] = field(
        default_factory=lambda: [1, 2, 3], metadata={"help": "Numbers of steps, which rows take in turn."}
    )
    procedural_look_back: int = field(default=1, metadata={"help": "How many steps back an operand may lie."})


def check_data(data: DataArguments, config: UniSDConfig) -> None:
    """Raise CommandError for a source that does not exist, and for a split or a file that would not be read."""
    if data.dataset not in GENERATED and _is_file(data.dataset):
        _check_file("dataset", data.dataset)
        if data.train_split != "train":
            raise CommandError(f"train_split={data.train_split}: a file has no splits; give the file to train on")
        if data.eval_split is not None:
            raise CommandError(
                f"eval_split={data.eval_split}: the file {data.dataset} has no splits; give the rows to evaluate on as "
                "--eval_file FILE"
            )
    if data.dataset_config is not None and (data.dataset in GENERATED or _is_file(data.dataset)):
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


def training_rows(data: DataArguments, config: UniSDConfig, model: str, lengths: Lengths | None = None) -> Dataset:
    """The rows to train on; `model` writes what they lack (see `prepared_rows`)."""
    return _rows(data, data.dataset, data.train_split, config, model, lengths)


def evaluation_rows(
    data: DataArguments, config: UniSDConfig, model: str, lengths: Lengths | None = None
) -> Dataset | None:
    """The rows to evaluate on, if any."""
    if data.eval_file is not None:
        return _rows(data, data.eval_file, "train", config, model, lengths)
    return None if data.eval_split is None else _rows(data, data.dataset, data.eval_split, config, model, lengths)


def _rows(
    data: DataArguments, source: str, split: str, config: UniSDConfig, model: str, lengths: Lengths | None
) -> Any:
    if source == "procedural":
        return procedural_dataset(
            data.procedural_rows,
            seed=config.seed,
            split=split,
            num_steps=data.procedural_steps,
            look_back=data.procedural_look_back,
            num_auxiliary=config.num_auxiliary,
        )
    if source == "diagnostic":
        settings = DiagnosticSettings(
            seed=config.seed,
            split=split,
            num_steps=tuple(data.procedural_steps),
            look_back=data.procedural_look_back,
        )
        return diagnostic_dataset(data.procedural_rows, settings, num_auxiliary=config.num_auxiliary)
    if is_prepared(source):
        _check_idle(data, source)
        return load_prepared(source)
    if is_benchmark(source):
        return prepared_rows(rows_to_train_on(source, split), data, config, model, lengths)
    if not is_local(source):
        rows = from_hub(source, split, data.dataset_config)
        if _have_views(rows.column_names):
            _check_idle(data, source)
            return rows
    raw = load_rows(source, split=split, config=data.dataset_config)
    if _have_views({name for row in raw for name in row}):
        _check_idle(data, source)
        return Dataset.from_list(raw)
    return prepared_rows(raw, data, config, model, lengths)


def _have_views(columns: Collection[str]) -> bool:
    """Whether rows with these columns are the trainer's own, and not questions and answers."""
    return "prompt" in columns and not {"teacher_prompt", "privileged_context"}.isdisjoint(columns)


def _check_idle(data: DataArguments, source: str) -> None:
    """Raise CommandError for settings of how rows are prepared where they have their views already."""
    defaults = DataArguments()
    for name in RAW_ROWS:
        if getattr(data, name) != getattr(defaults, name) and name != "contexts":
            raise CommandError(
                f"{name}={getattr(data, name)} has no effect: the rows of {source} have their views already"
            )


def _is_file(source: str) -> bool:
    path = Path(source).expanduser()
    return format_of(path) is not None or path.is_file()


def _check_file(name: str, file: str) -> None:
    path = Path(file).expanduser()
    if format_of(path) is None:
        raise CommandError(f"{name}={file} is not one of {', '.join(FORMATS)}")
    if not path.is_file():
        raise CommandError(f"{name}={file}: there is no such file")
