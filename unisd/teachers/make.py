"""The teacher that the settings of a run ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from unisd.modules import is_peft
from unisd.teachers.base import SelfTeacher, Teacher
from unisd.teachers.full import BaseTeacher, FullEMATeacher
from unisd.teachers.lora import AdapterEMATeacher, MergedEMATeacher
from unisd.teachers.sharded import ShardedBaseTeacher, ShardedEMATeacher

if TYPE_CHECKING:
    from unisd.config import UniSDConfig


def teacher_of_run(args: UniSDConfig, model: nn.Module, *, sharded: bool = False) -> Teacher:
    """The teacher that a config asks for, see `make_teacher`."""
    teacher, ema, decay = str(args.teacher), str(args.ema), float(args.ema_decay or 0.0)
    return make_teacher(model, teacher=teacher, ema=ema, decay=decay, sharded=sharded)


def make_teacher(model: nn.Module, *, teacher: str, ema: str, decay: float, sharded: bool = False) -> Teacher:
    """The teacher of a run.

    Args:
        model: the student, unwrapped, on its device, with the weights it starts from.
        teacher, ema, decay: as in `UniSDConfig`; `ema="auto"` is "adapter" for a PEFT model, else "full".
        sharded: whether an engine shards the weights (FSDP2), now or when training begins. The teacher then
            has no weights before its `start` was called.

    Raises:
        ValueError: a mode that does not fit the model.
    """
    if teacher == "base":
        return ShardedBaseTeacher() if sharded and not is_peft(model) else BaseTeacher(model)
    if ema == "none":
        return SelfTeacher()
    if ema == "auto":
        ema = "adapter" if is_peft(model) else "full"
    if ema == "full":
        return ShardedEMATeacher(model, decay, start=False) if sharded else FullEMATeacher(model, decay)
    of_lora = {"adapter": AdapterEMATeacher, "merged": MergedEMATeacher}
    return of_lora[ema](model, decay, start=not sharded)
