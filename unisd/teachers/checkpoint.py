"""The moving average in a checkpoint: one safetensors file, written and replaced whole."""

from __future__ import annotations

import os
from pathlib import Path

from unisd.teachers.base import EMATeacher
from unisd_kernels.files import replacing

STATE_FILE = "unisd_ema_teacher.safetensors"
"""File of a checkpoint that holds the moving average."""


def save_teacher(teacher: EMATeacher, folder: str | os.PathLike[str], global_step: int) -> Path:
    """Write the average into a checkpoint folder, in one step: a reader finds the whole file or none.

    Returns:
        The file.
    """
    from safetensors.torch import save_file

    path = Path(folder) / STATE_FILE
    state = teacher.state_dict()
    metadata = {"mode": state["mode"], "updates": str(state["updates"]), "global_step": str(global_step)}
    with replacing(path) as new:
        save_file({name: tensor.contiguous() for name, tensor in state["tensors"].items()}, new, metadata)
    return path


def load_teacher(teacher: EMATeacher, folder: str | os.PathLike[str], global_step: int) -> None:
    """Restore the average from a checkpoint folder.

    Args:
        global_step: of the checkpoint; the file must be of the same step.

    Raises:
        ValueError: the file is missing, of another step, mode or model.
    """
    from safetensors import safe_open

    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: the checkpoint is incomplete or was written without a moving-average teacher. "
            "Resume from another checkpoint, or train with ema='none'; restarting the average silently would change "
            "the run"
        )
    with safe_open(path, framework="pt") as reader:
        metadata = reader.metadata()
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 (not a dict)
    if int(metadata["global_step"]) != global_step:
        raise ValueError(
            f"{path} was written at step {metadata['global_step']} but the checkpoint is of step {global_step}: it "
            "mixes two runs; resume from another one"
        )
    teacher.load_state_dict({"mode": metadata["mode"], "updates": int(metadata["updates"]), "tensors": tensors})
