"""Checkpoint folders: which are whole, and which of them a run resumes from and keeps.

A checkpoint is written file by file, so a run that is killed meanwhile leaves a folder that looks like one. The last
file written is `MANIFEST`, in one step: the names and sizes of all others. A folder is whole if every file of its
manifest is there in its size, which also finds one that was half deleted. Folders without a manifest (of the plain
trainer, or of a run that was killed just before it) are judged by the files that resuming needs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from unisd_kernels.files import replacing

MANIFEST = "unisd_checkpoint.json"
"""File of a checkpoint that is written last: `{"global_step": int, "files": {name: bytes}}`."""

_STATE = "trainer_state.json"
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin")
_NAME = re.compile(rf"{re.escape(PREFIX_CHECKPOINT_DIR)}-(\d+)")


def unmark(folder: str | os.PathLike[str]) -> None:
    """Mark a folder as not whole, whatever it held, before it is written (again)."""
    for name in (MANIFEST, _STATE):
        (Path(folder) / name).unlink(missing_ok=True)


def mark_complete(folder: str | os.PathLike[str], global_step: int) -> None:
    """Write the manifest; to be called when every process has written its files."""
    folder = Path(folder)
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST and path.suffix != ".md"  # a model card may be edited
    }
    with replacing(folder / MANIFEST) as new:
        new.write_text(json.dumps({"global_step": global_step, "files": files}, indent=1) + "\n")


def fault_of(folder: str | os.PathLike[str]) -> str | None:
    """Reason why a checkpoint is unfit to resume from, in a few words; None if it is whole."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    manifest = folder / MANIFEST
    if manifest.is_file():
        try:
            files = json.loads(manifest.read_text())["files"]
        except (ValueError, KeyError, TypeError):
            return f"{MANIFEST} cannot be read"
        return _differs(folder, files)
    return _lacks(folder)


def newest_complete(run_folder: str | os.PathLike[str]) -> Path | None:
    """Whole checkpoint of the highest step; warns of each newer one that is not whole."""
    for folder in reversed(_checkpoints(run_folder)):
        fault = fault_of(folder)
        if fault is None:
            return folder
        warnings.warn(f"{folder} is incomplete and was skipped: {fault}", stacklevel=3)
    return None


def resumable(resume: str | os.PathLike[str] | bool | None, run_folder: str | os.PathLike[str]) -> str | None:
    """Folder that a run resumes from.

    Args:
        resume: as in `Trainer.train`: True for the newest whole checkpoint of `run_folder`, a path, or nothing.

    Raises:
        ValueError: no whole checkpoint, or a path to one that is not whole.
    """
    if resume is None or resume is False:
        return None
    if resume is True:
        newest = newest_complete(run_folder)
        if newest is None:
            raise ValueError(f"there is no complete checkpoint in {run_folder} to resume from; start without resuming")
        return str(newest)
    fault = fault_of(resume)
    if fault is not None:
        raise ValueError(f"cannot resume from {resume}: the checkpoint is incomplete ({fault}); choose another one")
    return str(resume)


@contextmanager
def keeping_all(args: Any) -> Iterator[int | None]:
    """Keep the trainer from deleting checkpoints; yields the limit (`save_total_limit`) that is put back afterwards."""
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        yield limit
    finally:
        args.save_total_limit = limit


def rotate(run_folder: str | os.PathLike[str], limit: int | None, keep: set[str]) -> None:
    """Delete checkpoints until `limit` are left (None or 0: keep all), incomplete ones first, then the oldest.

    Args:
        keep: folders that stay: the one just written, the best one.
    """
    if not limit or limit < 0:
        return
    kept = {Path(folder).resolve() for folder in keep}
    checkpoints = _checkpoints(run_folder)
    broken = {folder for folder in checkpoints if fault_of(folder) is not None}
    # By time, since a run that was started anew counts its steps from 0; seconds, which every file system tells apart.
    order = sorted(checkpoints, key=lambda folder: (folder not in broken, int(folder.stat().st_mtime), _step(folder)))
    surplus = len(order) - limit
    for folder in order:
        if surplus <= 0:
            break
        if folder.resolve() in kept:
            continue
        # Without its manifest first: what is left of a deletion that was cut off must not look whole.
        unmark(folder)
        shutil.rmtree(folder, ignore_errors=True)
        surplus -= 1


def is_checkpoint(folder: Path) -> bool:
    """Whether it is a folder with the name of a checkpoint."""
    return folder.is_dir() and _NAME.fullmatch(folder.name) is not None


def _checkpoints(run_folder: str | os.PathLike[str]) -> list[Path]:
    """Folders of checkpoints by step, oldest first."""
    run_folder = Path(run_folder)
    if not run_folder.is_dir():
        return []
    return sorted(filter(is_checkpoint, run_folder.iterdir()), key=_step)


def _step(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def _differs(folder: Path, files: dict[str, int]) -> str | None:
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes for {size}"
    return None


def _lacks(folder: Path) -> str | None:
    """Part of every checkpoint that a folder without a manifest lacks, or None."""
    if any(folder.glob("rng_state_*.pth")):
        # Nothing in it tells how many processes there were, and so which of their files are missing.
        return f"{MANIFEST} is missing, which comes last where several processes write"
    try:
        json.loads((folder / _STATE).read_text())
    except FileNotFoundError:
        return f"{_STATE} is missing"
    except ValueError:
        return f"{_STATE} was cut off"
    for index in _INDEXES:
        if (folder / index).is_file():
            try:
                shards = set(json.loads((folder / index).read_text())["weight_map"].values())
            except (ValueError, KeyError):
                return f"{index} was cut off"
            weights = sorted(shards)
            break
    else:
        weights = [name for name in _WEIGHTS if (folder / name).is_file()]
        if not weights and not any(folder.glob("global_step*")) and not any(folder.glob("pytorch_model_fsdp*")):
            return "it holds no weights"
    for name in weights:
        if not (folder / name).is_file():
            return f"{name} is missing"
    return next((f for f in map(_cut_off, sorted(folder.glob("*.safetensors"))) if f), None)


def _cut_off(path: Path) -> str | None:
    """Difference between a safetensors file and the length its header tells, in words, or None."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(length, 100 << 20)))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError):
            return f"{path.name} was cut off"
    expected = 8 + length + end
    size = path.stat().st_size
    return None if size == expected else f"{path.name} has {size} bytes for {expected}"
