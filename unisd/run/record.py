"""Record of a run in its folder, beside the weights: its settings when it begins, and a card with every checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from unisd.run.disk import check_room, checkpoint_bytes
from unisd.run.model_card import model_card, write_model_card
from unisd.run.settings import write_settings

if TYPE_CHECKING:
    from unisd.trainer import UniSDTrainer


class RunRecord(TrainerCallback):
    """Callback that writes `unisd_config.yaml` when training begins, and it and README.md into each checkpoint."""

    def __init__(self, trainer: UniSDTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save and getattr(args.save_strategy, "value", args.save_strategy) != "no":
            check_room(args.output_dir, checkpoint_bytes(self._trainer), "a checkpoint of this run")
        if state.is_world_process_zero:
            write_settings(args.output_dir, self._trainer.recorded_settings)

    def write(self, checkpoint: str) -> None:
        """Write both files into a checkpoint that is being written (by one process)."""
        write_settings(checkpoint, self._trainer.recorded_settings)
        write_model_card(checkpoint, model_card(self._trainer))
