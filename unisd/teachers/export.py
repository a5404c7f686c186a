"""The moving average of a run as a model, or an adapter, that `from_pretrained` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from unisd.modules import is_peft
from unisd.teachers.base import EMATeacher
from unisd.teachers.checkpoint import STATE_FILE, load_teacher
from unisd.teachers.lora import MergedEMATeacher
from unisd.teachers.make import make_teacher
from unisd_kernels.files import replacing


def export_teacher(folder: Path, output: Path, *, merge: bool = False, base: str | None = None) -> str:
    """Write the average in `folder` to `output`, in one step.

    Args:
        folder: of a run or of a checkpoint, with the model and its average.
        merge: of an adapter's factors: a whole model.
        base: of an adapter; None for the one it names.

    Returns:
        What was written, in words.

    Raises:
        ValueError: no average there, or one of another model.
    """
    from safetensors import safe_open

    from unisd.models import is_adapter, load_model

    file = folder / STATE_FILE
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no moving average ({STATE_FILE}): train with ema=full, adapter or merged, or name one of "
            "the run's checkpoints"
        )
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    mode, step = metadata["mode"], int(metadata["global_step"])
    source: Any = (base, folder) if base is not None and is_adapter(folder) else (folder, None)
    model, tokenizer = load_model(source[0], adapter=source[1])
    _set_trainable(model)
    teacher = make_teacher(model, teacher="self", ema=mode, decay=0.0)
    assert isinstance(teacher, EMATeacher)
    load_teacher(teacher, folder, step)
    with replacing(output) as new:
        if mode == "adapter" and not merge:
            _put(model, teacher)
            model.save_pretrained(str(new))
            what = "adapter of the teacher's averages"
        else:
            _merged(model, teacher).save_pretrained(str(new))
            what = "model with the teacher's weights"
        tokenizer.save_pretrained(str(new))
    return what


def _set_trainable(model: Any) -> None:
    """Make those weights require a gradient that did in training, by which a teacher finds them."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_peft(model) or "lora_" in name or "modules_to_save" in name)


@torch.no_grad()
def _put(model: Any, teacher: EMATeacher) -> None:
    parameters = dict(model.named_parameters())
    for name, average in teacher.tensors().items():
        parameters[name].copy_(average)


@torch.no_grad()
def _merged(model: Any, teacher: EMATeacher) -> Any:
    """The whole model with the averages in it."""
    if isinstance(teacher, MergedEMATeacher):
        return teacher.merge_into(model)
    _put(model, teacher)
    return model.merge_and_unload() if is_peft(model) else model
