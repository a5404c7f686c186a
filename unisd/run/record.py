"""Start of a run: room on the disk for a checkpoint, and the settings in the run's folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from unisd.run.disk import check_room, checkpoint_bytes
from unisd.run.settings import write_settings

if TYPE_CHECKING:
    from unisd.trainer import UniSDTrainer


class RunRecord(TrainerCallback):
    """Callback that asks for room and writes `unisd_config.yaml` when training begins."""

    def __init__(self, trainer: UniSDTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save and getattr(args.save_strategy, "value", args.save_strategy) != "no":
            check_room(args.output_dir, checkpoint_bytes(self._trainer), "a checkpoint of this run")
        if state.is_world_process_zero:
            write_settings(args.output_dir, self._trainer.recorded_settings)
