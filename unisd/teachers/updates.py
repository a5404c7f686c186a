"""Updates of a moving-average teacher during a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback

from unisd.teachers.base import EMATeacher


class TeacherUpdates(TrainerCallback):
    """Callback that moves the average every `sync_steps` optimizer steps.

    Args:
        teacher: the average.
        student: gives the model, unwrapped.
    """

    def __init__(self, teacher: EMATeacher, student: Callable[[], nn.Module]) -> None:
        self._teacher = teacher
        self._student = student

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.sync_steps == 0:
            self._teacher.update(self._student())
