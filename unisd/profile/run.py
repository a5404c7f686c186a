"""Measuring of a trainer's steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from unisd.profile.phases import StepProfile
from unisd.profile.report import table, write
from unisd.teachers import EMATeacher

if TYPE_CHECKING:
    from unisd.trainer import UniSDTrainer


class ProfiledRun(TrainerCallback):
    """Callback that measures backward, optimizer and moving average, and reports all phases when training ends.

    Args:
        trainer: of the run; its own code measures the phases before the backward pass.
    """

    def __init__(self, trainer: UniSDTrainer, profile: StepProfile) -> None:
        self._trainer, self._profile = trainer, profile
        self._optimizing: Any = None
        accelerator, backward = trainer.accelerator, trainer.accelerator.backward

        def measured(*args: Any, **kwargs: Any) -> Any:
            with profile.phase("backward"):
                return backward(*args, **kwargs)

        accelerator.backward = measured
        teacher = trainer.teacher
        if isinstance(teacher, EMATeacher):
            update = teacher.update

            def measured_update(model: Any) -> None:
                with profile.phase("moving average"):
                    update(model)

            teacher.update = measured_update  # type: ignore[method-assign]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._profile.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizing = self._profile.phase("optimizer")
        self._optimizing.__enter__()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._optimizing is not None:
            self._optimizing.__exit__(None, None, None)
            self._optimizing = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._profile.end_step()
        self._profile.begin_step()  # the next one: its rollout comes before any other sign of it

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._profile.stop()
        if not state.is_world_process_zero or not self._profile.steps:
            return
        numbers, picture = write(self._profile, Path(args.output_dir))
        print("\nwhere a step's time goes")
        print("\n".join(table(self._profile)))
        print(f"  {picture}, {numbers}")
