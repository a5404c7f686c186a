"""Record of a run in its folder: room on the disk for a checkpoint, the settings, the energy that it takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from unisd.energy import FILE_NAME, NAME, EnergyMeter
from unisd.run.disk import check_room, checkpoint_bytes
from unisd.run.settings import write_settings
from unisd_kernels.files import write_json

if TYPE_CHECKING:
    from unisd.trainer import UniSDTrainer


class RunRecord(TrainerCallback):
    """Callback that asks for room and writes `unisd_config.yaml` when training begins, logs the energy of this process
    with every step, and writes `energy.json` at the end."""

    def __init__(self, trainer: UniSDTrainer) -> None:
        self._trainer = trainer
        self._meter: EnergyMeter | None = None
        self._before = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save and getattr(args.save_strategy, "value", args.save_strategy) != "no":
            check_room(args.output_dir, checkpoint_bytes(self._trainer), "a checkpoint of this run")
        if state.is_world_process_zero:
            write_settings(args.output_dir, self._trainer.recorded_settings)
            if state.global_step == 0:
                (Path(args.output_dir) / FILE_NAME).unlink(missing_ok=True)  # of a run that is written over
        self._before = max((entry[NAME] for entry in state.log_history if NAME in entry), default=0.0)
        self._meter = EnergyMeter(self._trainer.accelerator.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._meter is None:  # a step outside `train()`, as a benchmark makes them
            return
        # The latest value of a log, not a mean over steps.
        self._trainer._metrics["train"][NAME] = [self._before + self._meter.read().joules]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._meter is not None
        if state.is_world_process_zero:
            taken = self._meter.read()
            record = {"before_resuming": self._before, "processes": args.world_size, **taken.as_dict()}
            write_json(Path(args.output_dir) / FILE_NAME, {**record, "joules": self._before + taken.joules})
