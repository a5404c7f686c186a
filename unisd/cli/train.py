"""`unisd train`: a UniSD run from a YAML file and the command line. The command line beats the file.

    unisd train --dataset questions.jsonl --output_dir runs/mine
    unisd train --preset plain --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset questions.jsonl --output_dir runs/a
    unisd train --config run.yaml --learning_rate 1e-4

What is usually set: --dataset, --model_name_or_path, --preset (`unisd presets`), --output_dir, --max_steps or
--num_train_epochs, --learning_rate, --per_device_train_batch_size, --gradient_accumulation_steps,
--max_completion_length, --num_auxiliary, --no_use_peft, --drift_budget.

Settings are those of `UniSDConfig` (and so of `trl.DistillationConfig`), of `trl.ModelConfig`, of `DataArguments` and
of `RunArguments`. A default of None for what a preset sets means: the preset's. The run folder gets them all as
`unisd_config.yaml`.
"""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unisd.cli.checks import check_settings
from unisd.cli.data import DataArguments, check_data, evaluation_rows, has_evaluation, training_rows
from unisd.cli.errors import CommandError, setting_up
from unisd.cli.model import ModelArguments, model_to_train
from unisd.cli.output_folder import claim_output_dir, make_writable
from unisd.cli.preset_defaults import preset_defaults
from unisd.cli.rows_to_prepare import Lengths
from unisd.cli.settings import SettingsParser
from unisd.cli.summary import summary
from unisd.config import UniSDConfig
from unisd.contexts import LengthLimit
from unisd.evaluation.folder import EVALUATIONS
from unisd.prepare.folder import folder_of
from unisd.run.checkpoints import is_checkpoint
from unisd.run.final_evaluation import FinalEvaluation
from unisd.run.hub import keep_token_out, push_run
from unisd.run.processes import ending_process_group
from unisd.run.settings import resolved_settings
from unisd.sweep.cells import FINISHED
from unisd.teachers import STATE_FILE, STATE_FOLDER
from unisd.trainer import UniSDTrainer


@dataclass
class RunArguments:
    """Treatment of an output folder that is not empty."""

    resume: bool = field(
        default=False,
        metadata={"help": "Go on from the newest checkpoint in output_dir (resume_from_checkpoint=true)."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Write over the run in output_dir; its checkpoints and evaluations are deleted."},
    )


@dataclass(frozen=True)
class Settings:
    """Settings of a run as it was asked for, checked."""

    data: DataArguments
    config: UniSDConfig
    model: ModelArguments
    run: RunArguments
    # Settings that follow from this machine.
    derived: tuple[str, ...] = ()
    # Names of those that the user gave.
    given: frozenset[str] = frozenset()

    @property
    def resume(self) -> str | bool | None:
        """Value for `Trainer.train(resume_from_checkpoint=)`."""
        asked = self.config.resume_from_checkpoint
        return True if self.run.resume or asked in ("true", "True", "last") else asked


def parse(arguments: Sequence[str]) -> Settings:
    """The settings of file and command line.

    Raises:
        CommandError: an unknown or impossible setting, or one that would have no effect.
        ValueError, TypeError: a value that `UniSDConfig` refuses.
    """
    parser = SettingsParser(
        (DataArguments, UniSDConfig, ModelArguments, RunArguments), prog="unisd train", description=__doc__
    )
    # Without it transformers refuses the default precision, bfloat16, on a machine without an accelerator.
    derived: dict[str, Any] = {} if torch.accelerator.is_available() else {"use_cpu": True}
    defaults = {**derived, **preset_defaults(parser.peek(arguments))}
    instances, given = parser.parse(arguments, defaults)
    check_settings(instances, given)
    data, config, model, run = instances
    settings = Settings(data, config, model, run, derived=tuple(derived.keys() - given.keys()), given=frozenset(given))
    check_data(settings.data, settings.config)
    asked = settings.config.resume_from_checkpoint
    if isinstance(settings.resume, str) and not Path(settings.resume).is_dir():
        raise CommandError(f"resume_from_checkpoint={asked}: there is no such folder")
    if settings.run.resume and isinstance(asked, str) and asked not in ("true", "True", "last"):
        raise CommandError(f"--resume takes the newest checkpoint of output_dir, but resume_from_checkpoint is {asked}")
    return settings


def build(settings: Settings) -> UniSDTrainer:
    """Load model and rows."""
    recorded = resolved_settings(settings.data, settings.config, settings.model)  # before loading fills in more
    for name in settings.derived:
        del recorded[name]  # so that the file serves on another machine too
    model = model_to_train(settings.model, settings.config)
    name = str(settings.model.model_name_or_path)
    lengths = Lengths(model.tokenizer, LengthLimit.of_run(settings.config, model.config))
    rows = training_rows(settings.data, settings.config, name, lengths)
    fit_step(settings, rows)
    trainer = UniSDTrainer(
        model=model.source,
        args=settings.config,
        train_dataset=rows,
        eval_dataset=evaluation_rows(settings.data, settings.config, name, lengths),
        processing_class=model.tokenizer,
        quantization_config=model.quantization_config,
        peft_config=model.peft_config,
    )
    trainer.recorded_settings = recorded
    return trainer


def fit_step(settings: Settings, rows: Any) -> None:
    """Make the optimizer step no larger than the rows, by settings that nobody gave, and say so.

    A preset's step is made for thousands of rows; twenty shall train too.
    """
    config, count = settings.config, len(rows) if hasattr(rows, "__len__") else 0
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    free = {"per_device_train_batch_size", "gradient_accumulation_steps"} - settings.given
    if not count or count >= batch * accumulation * config.world_size or not free:
        return
    share = max(1, count // config.world_size)
    if "per_device_train_batch_size" in free:
        room = share if "gradient_accumulation_steps" in free else share // accumulation
        config.per_device_train_batch_size = max(1, min(batch, room))
    if "gradient_accumulation_steps" in free:
        config.gradient_accumulation_steps = max(1, min(accumulation, share // config.per_device_train_batch_size))
    if config.process_index > 0:
        return
    print(
        f"unisd train: {count} rows are fewer than a step of {batch} x {accumulation} takes: it is "
        f"{config.per_device_train_batch_size} x {config.gradient_accumulation_steps} here",
        file=sys.stderr,
    )


def main(arguments: list[str]) -> int:
    # Between TRL and transformers; a user of this command can do nothing about it.
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing", category=FutureWarning)
    # The settings join the processes: TRL's config starts the process group.
    with ending_process_group():
        return _train(arguments)


def _train(arguments: list[str]) -> int:
    with setting_up():
        settings = parse(arguments)
        keep_token_out(settings.config)
        _prepare_output_dir(settings)
        trainer = build(settings)
    if has_evaluation(settings.data) and settings.config.eval_strategy == "no":
        trainer.add_callback(FinalEvaluation())
    trainer.train(resume_from_checkpoint=settings.resume)
    trainer.save_finished()
    if settings.config.process_index == 0:
        name, rows = str(settings.model.model_name_or_path), folder_of(trainer.train_dataset)
        print(summary(trainer, name, settings.data.dataset, rows))
    if settings.config.push_to_hub and (url := push_run(trainer)):
        print(f"\npushed to {url}")
    return 0


def _prepare_output_dir(settings: Settings) -> None:
    if settings.config.process_index != 0:
        return  # the first process may be writing into it by now
    folder = Path(str(settings.config.output_dir))
    resume: Any = settings.resume
    claim_output_dir(folder, resume=bool(resume), overwrite=settings.run.overwrite_output_dir)
    checkpoints = [entry for entry in folder.iterdir() if is_checkpoint(entry)] if folder.is_dir() else []
    if resume is True and not checkpoints:
        raise CommandError(f"there is no checkpoint in output_dir {folder} to resume from")
    if settings.run.overwrite_output_dir:
        # All of it belongs to weights that will be gone.
        evaluations = [folder / EVALUATIONS] if (folder / EVALUATIONS).is_dir() else []
        states = [folder / STATE_FOLDER] if (folder / STATE_FOLDER).is_dir() else []
        for entry in [*checkpoints, *states, *evaluations]:
            print(f"deleting {entry}, of the run that is overwritten", file=sys.stderr)
            shutil.rmtree(entry)
        for name in (STATE_FILE, "trainer_state.json", FINISHED):
            (folder / name).unlink(missing_ok=True)
    make_writable(folder, "--output_dir")
