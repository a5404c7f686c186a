"""The moving average in a checkpoint: one safetensors file; of sharded weights a folder that every process writes into.

Both hold the same averages by the same names. The folder is torch.distributed.checkpoint's, so any number of processes,
or a single one without a process group, reads it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed import checkpoint as sharded_checkpoint
from torch.distributed.tensor import DTensor

from unisd.teachers.base import EMATeacher
from unisd_kernels.files import replacing, write_json

STATE_FILE = "unisd_ema_teacher.safetensors"
"""File of a checkpoint that holds the moving average of whole weights."""
STATE_FOLDER = "unisd_ema_teacher"
"""Folder of a checkpoint that holds the moving average of sharded weights."""
_ABOUT = "average.json"
_DTYPES = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Average:
    """What a checkpoint says of its moving average.

    Attributes:
        mode: "full", "adapter" or "merged".
        updates: number of updates it was made of.
        global_step: optimizer steps before it was saved.
    """

    mode: str
    updates: int
    global_step: int


def is_sharded_average(teacher: EMATeacher) -> bool:
    """Whether an average lies in shards, so that every process has to save it."""
    return any(isinstance(tensor, DTensor) for tensor in teacher.tensors().values())


def save_teacher(teacher: EMATeacher, folder: str | os.PathLike[str], global_step: int) -> Path:
    """Write the average into a checkpoint folder, in one step: a reader finds the whole file or none. Of sharded
    weights each process writes what it holds, all have to call it, and the file that makes it whole comes last.

    Returns:
        The file, or the folder.
    """
    from safetensors.torch import save_file

    about = Average(teacher.mode, teacher.updates, global_step)
    if is_sharded_average(teacher):
        path = Path(folder) / STATE_FOLDER
        if distributed.get_rank() == 0:
            path.mkdir(parents=True, exist_ok=True)
            (path / _ABOUT).unlink(missing_ok=True)
        sharded_checkpoint.save(dict(teacher.tensors()), checkpoint_id=path)
        if distributed.get_rank() == 0:
            write_json(path / _ABOUT, {**vars(about), "shapes": teacher.shapes})
        return path
    path = Path(folder) / STATE_FILE
    state = teacher.state_dict()
    metadata = {name: str(value) for name, value in vars(about).items()}
    with replacing(path) as new:
        save_file({name: tensor.contiguous() for name, tensor in state["tensors"].items()}, new, metadata)
    return path


def load_teacher(teacher: EMATeacher, folder: str | os.PathLike[str], global_step: int) -> None:
    """Restore the average from a checkpoint folder; a sharded one onto any number of processes, which all have to call
    it.

    Args:
        global_step: of the checkpoint; the average must be of the same step.

    Raises:
        ValueError: the average is missing, of another step, mode or model.
    """
    saved = SavedAverage.in_folder(folder)
    if saved is None:
        raise ValueError(
            f"{Path(folder) / STATE_FILE} is missing: the checkpoint is incomplete or was written without a "
            "moving-average teacher. Resume from another checkpoint, or train with ema='none'; restarting the average "
            "silently would change the run"
        )
    if saved.about.global_step != global_step:
        raise ValueError(
            f"{saved.path} was written at step {saved.about.global_step} but the checkpoint is of step {global_step}: "
            "it mixes two runs; resume from another one"
        )
    teacher.check_fits(saved.about.mode, saved.tensors)
    saved.read_into(teacher.tensors())
    teacher.loaded(saved.about.updates)


@dataclass(frozen=True)
class SavedAverage:
    """An average on the disk.

    Attributes:
        path: its file or folder.
        about: what it is.
        tensors: dtype and shape of each tensor by name, as it lies there.
        shapes: of those that lie flat, as ZeRO-3 cuts them.
    """

    path: Path
    about: Average
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def in_folder(cls, folder: str | os.PathLike[str]) -> SavedAverage | None:
        """The average in a checkpoint, or None if there is none."""
        whole, sharded = Path(folder) / STATE_FILE, Path(folder) / STATE_FOLDER
        if whole.is_file():
            return cls._of_file(whole)
        return cls._of_folder(sharded) if (sharded / _ABOUT).is_file() else None

    @classmethod
    def _of_file(cls, path: Path) -> SavedAverage:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as reader:
            metadata = reader.metadata()
            slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118 (not a dict)
            tensors = {name: (_DTYPES[part.get_dtype()], tuple(part.get_shape())) for name, part in slices.items()}
        about = Average(metadata["mode"], int(metadata["updates"]), int(metadata["global_step"]))
        return cls(path, about, tensors)

    @classmethod
    def _of_folder(cls, path: Path) -> SavedAverage:
        entries: dict[str, Any] = sharded_checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata
        tensors = {name: (entry.properties.dtype, tuple(entry.size)) for name, entry in entries.items()}
        about = json.loads((path / _ABOUT).read_text())
        shapes = {name: tuple(shape) for name, shape in about.pop("shapes", {}).items()}
        return cls(path, Average(**about), tensors, shapes)

    def each(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors by name, whole, in their shape, one at a time: the average of a large model is twice its size."""
        from safetensors import safe_open

        if self.path.is_dir():
            for name, (dtype, shape) in sorted(self.tensors.items()):
                tensor = torch.empty(shape, dtype=dtype)
                self.read_into({name: tensor})
                yield name, tensor.view(self.shapes.get(name, shape))
            return
        with safe_open(self.path, framework="pt") as reader:
            for name in sorted(self.tensors):
                yield name, reader.get_tensor(name)

    @torch.no_grad()
    def read_into(self, tensors: dict[str, torch.Tensor]) -> None:
        """Fill tensors of these names, shapes and dtypes, whole or sharded; of sharded ones each process its own."""
        if self.path.is_dir():
            alone = not (distributed.is_available() and distributed.is_initialized())
            sharded_checkpoint.load(dict(tensors), checkpoint_id=self.path, no_dist=alone)
            return
        from safetensors import safe_open

        if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
            raise ValueError(f"{self.path} is of a run with whole weights, these are in shards: resume as that run was")
        with safe_open(self.path, framework="pt") as reader:
            for name, tensor in tensors.items():
                tensor.copy_(reader.get_tensor(name))
