"""What a run leaves in its folder beside the weights: its settings when it begins, and a card with every checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from unisd.model_card import model_card, write_model_card
from unisd.run_config import write_settings

if TYPE_CHECKING:
    from unisd.trainer import UniSDTrainer


class RunRecord(TrainerCallback):
    """Writes `unisd_config.yaml` into the output folder, and it and README.md into every checkpoint."""

    def __init__(self, trainer: UniSDTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_settings(args.output_dir, self._trainer.recorded_settings)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():  # else it was pushed away by save_total_limit
            write_settings(folder, self._trainer.recorded_settings)
            write_model_card(folder, model_card(self._trainer))
