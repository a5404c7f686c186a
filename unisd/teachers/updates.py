"""What a teacher is told of during a run: updates of a moving average, and that the student's weights moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback

from unisd.teachers.base import EMATeacher, Teacher


class TeacherUpdates(TrainerCallback):
    """Callback that moves an average every `sync_steps` optimizer steps.

    Args:
        teacher: the average, or a teacher without one.
        student: gives the model, unwrapped.
    """

    def __init__(self, teacher: Teacher, student: Callable[[], nn.Module]) -> None:
        self._teacher = teacher
        self._student = student

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._teacher.weights_moved()
        if isinstance(self._teacher, EMATeacher) and state.global_step % args.sync_steps == 0:
            self._teacher.update(self._student())
