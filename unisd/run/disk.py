"""Room on the disk for what a run writes: asked for before anything is written over, waited for where it is missing."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unisd.sharding import numel_of

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

MOST_MINUTES = 20
"""Longest wait for room. Other processes wait in a collective, which `ddp_timeout` (30 minutes) ends."""

_SPARE_BYTES = 16 << 20  # trainer state, tokenizer, model card, metadata


def free_bytes(folder: str | os.PathLike[str]) -> int:
    """Bytes that can be written to the file system of a folder, which need not exist yet."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def weight_bytes(trainer: Trainer) -> int:
    """Size of the model as it is saved: of the adapter, or of all weights."""
    from unisd.modules import is_peft

    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad or not is_peft(model)]
    return _bytes(parameters) + _SPARE_BYTES


def checkpoint_bytes(trainer: Trainer) -> int:
    """Size of a checkpoint as it will be: the weights that are saved, the optimizer's state, the teacher's average.

    Before its first step the optimizer is taken for one with two numbers a trained weight, as Adam has.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = [
        tensor
        for entry in getattr(trainer.optimizer, "state", {}).values()
        for tensor in entry.values()
        if isinstance(tensor, torch.Tensor)
    ]
    optimizer = _bytes(state) if state else 2 * _bytes(trained)
    return weight_bytes(trainer) + optimizer + beside_bytes(trainer)


def beside_bytes(trainer: Trainer) -> int:
    """Size of the teacher's average, which is saved beside the model."""
    from unisd.teachers import EMATeacher

    teacher = getattr(trainer, "teacher", None)
    return _bytes(teacher.tensors().values()) if isinstance(teacher, EMATeacher) else 0


def check_room(folder: str | os.PathLike[str], needed: int, what: str) -> None:
    """Raise ValueError if the disk of `folder` has less than `needed` bytes for `what`."""
    free = free_bytes(folder)
    if free < needed:
        raise ValueError(
            f"{what} takes {shown_size(needed)}, but the disk of {folder} has {shown_size(free)} left: make room, or "
            "choose another output_dir"
        )


def wait_for_room(
    folder: str | os.PathLike[str], needed: int, what: str, *, minutes: float = MOST_MINUTES, poll_seconds: float = 10.0
) -> None:
    """Return when the disk of `folder` has `needed` bytes for `what`; say at once, and every minute, that it has not.

    Raises:
        OSError: still no room after so many minutes.
    """
    started, told = time.monotonic(), float("-inf")
    while (free := free_bytes(folder)) < needed:
        waited = time.monotonic() - started
        if waited > 60 * minutes:
            raise OSError(
                f"{what} takes {shown_size(needed)}, but the disk of {folder} has {shown_size(free)} left after "
                f"{minutes:g} minutes of waiting; what was saved before is untouched: make room and go on with --resume"
            )
        if waited - told >= 60:
            told = waited
            logger.warning(
                "the disk of %s is full: %s takes %s, %s are left. Training waits up to %g minutes for room; nothing "
                "is lost yet",
                folder,
                what,
                shown_size(needed),
                shown_size(free),
                minutes,
            )
        time.sleep(poll_seconds)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(numel_of(tensor) * tensor.element_size() for tensor in tensors)


def shown_size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
