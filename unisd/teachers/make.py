"""The teacher that the settings of a run ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from unisd.modules import is_peft
from unisd.teachers.base import SelfTeacher, Teacher
from unisd.teachers.full import BaseTeacher, FullEMATeacher
from unisd.teachers.lora import AdapterEMATeacher, MergedEMATeacher

if TYPE_CHECKING:
    from unisd.config import UniSDConfig


def teacher_of_run(args: UniSDConfig, model: nn.Module) -> Teacher:
    """The teacher that a config asks for, see `make_teacher`."""
    return make_teacher(model, teacher=str(args.teacher), ema=str(args.ema), decay=float(args.ema_decay or 0.0))


def make_teacher(model: nn.Module, *, teacher: str, ema: str, decay: float) -> Teacher:
    """The teacher of a run.

    Args:
        model: the student, unwrapped, on its device, with the weights it starts from.
        teacher, ema, decay: as in `UniSDConfig`; `ema="auto"` is "adapter" for a PEFT model, else "full".

    Raises:
        ValueError: a mode that does not fit the model.
    """
    if teacher == "base":
        return BaseTeacher(model)
    if ema == "none":
        return SelfTeacher()
    if ema == "auto":
        ema = "adapter" if is_peft(model) else "full"
    classes: dict[str, type[FullEMATeacher | AdapterEMATeacher | MergedEMATeacher]] = {
        "full": FullEMATeacher,
        "adapter": AdapterEMATeacher,
        "merged": MergedEMATeacher,
    }
    return classes[ema](model, decay)
