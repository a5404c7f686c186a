"""Saving and resuming of a trainer: checkpoints that are whole or not at all, on a disk that has room."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from unisd.run.checkpoints import keeping_all, mark_complete, resumable, rotate, unmark
from unisd.run.disk import beside_bytes, checkpoint_bytes, wait_for_room, weight_bytes
from unisd.run.model_card import model_card, write_model_card
from unisd.run.settings import write_settings

if TYPE_CHECKING:
    from transformers import Trainer

    _Base = Trainer
else:
    _Base = object


class CheckpointedTrainer(_Base):
    """Base of a trainer that saves as this package does; stands before the class of `transformers` or TRL.

    Attributes:
        recorded_settings: by name, for the run's folder; `unisd train` adds those of model and data.
    """

    recorded_settings: dict[str, Any]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `transformers.Trainer` does, but resume from complete checkpoints only (`unisd.run.checkpoints`).

        Args:
            resume_from_checkpoint: True for the newest complete checkpoint of `output_dir` (newer ones that a kill cut
                off are named in a warning), or the folder of one.

        Raises:
            ValueError: no complete checkpoint, or a folder that is not one.
        """
        checkpoint = resumable(resume_from_checkpoint, str(self.args.output_dir))
        if checkpoint is not None:
            self.check_resumable(checkpoint)
        return super().train(checkpoint, *args, **kwargs)

    def check_resumable(self, checkpoint: str) -> None:
        """Raise ValueError for a whole checkpoint that this run cannot go on from."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `transformers.Trainer` does, once the disk has room: a finished run's weights exist nowhere else."""
        if self.args.should_save and not _internal_call:
            wait_for_room(output_dir or str(self.args.output_dir), weight_bytes(self), "the model")
        super().save_model(output_dir, _internal_call)

    def save_finished(self) -> None:
        """Save a finished run into its folder: the model, what a checkpoint of this trainer holds beside it, the log
        (trainer_state.json) and the card. Pushes nothing (see `unisd.run.hub`)."""
        folder = str(self.args.output_dir)
        if self.args.should_save:
            wait_for_room(folder, weight_bytes(self) + beside_bytes(self), "the model")
        with self.whole_weights():
            super().save_model(folder, _internal_call=True)
        self.write_beside(folder)
        self.save_state()
        self.create_model_card()

    def create_model_card(  # type: ignore[override]  # TRL's signature, which is not transformers'
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md into the output folder: base model, recipe, metrics, drift (see `unisd.run.model_card`)."""
        if self.is_world_process_zero():
            write_model_card(str(self.args.output_dir), model_card(cast(Any, self), model_name, dataset_name, tags))

    def whole_weights(self) -> AbstractContextManager[None]:
        """Context in which the model is saved whole, where its checkpoints are in shards."""
        return nullcontext()

    def write_beside(self, folder: str) -> None:
        """Write what else a checkpoint of this trainer holds; called on every process, before all other files."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_folder = self._get_output_dir(trial)
        folder = os.path.join(run_folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            # Before anything is written over: a disk that is full costs a wait, not a checkpoint.
            wait_for_room(run_folder, checkpoint_bytes(self), f"the checkpoint of step {self.state.global_step}")
            unmark(folder)
        self.accelerator.wait_for_everyone()
        self.write_beside(folder)
        # Older checkpoints go only when this one is whole, which is after every process has written its part.
        with keeping_all(self.args) as limit:
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_settings(folder, self.recorded_settings)
            write_model_card(folder, model_card(cast(Any, self)))
            mark_complete(folder, self.state.global_step)
            best = self.state.best_model_checkpoint
            rotate(run_folder, limit, {folder} | ({best} if best else set()))
