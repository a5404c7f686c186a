"""A checkpoint as a model for others: the student, or its moving-average teacher, whole or as an adapter."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from trl.trainer.utils import create_model_from_path

from unisd.models import base_of, is_adapter, resolve_model
from unisd.modules import is_peft
from unisd.run.checkpoints import MANIFEST, fault_of, is_checkpoint, newest_complete
from unisd.run.disk import check_room, shown_size
from unisd.run.settings import FILE_NAME
from unisd.teachers import STATE_FILE, Average
from unisd.teachers.export import put_average, read_average
from unisd.text_tokenizer import load_tokenizer
from unisd_kernels.files import replacing

_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: with weights, tokenizer and README.md; `unisd.load_model` reads it.
        checkpoint: where it came from.
        average: of the moving average, or None for the student.
        adapter: whether it is an adapter, whose base is not in it.
        size: bytes of the weights.
        base: name of the model before training, or None where the checkpoint does not tell.
    """

    folder: Path
    checkpoint: Path
    average: Average | None
    adapter: bool
    size: int
    base: str | None


def export_model(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    ema: bool,
    merge: bool = False,
    base: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Exported:
    """Write the model of a checkpoint into a new folder, whole or not at all.

    Args:
        source: a checkpoint folder, or that of a run, for its newest weights.
        folder: must not exist, or be empty.
        ema: the moving-average teacher instead of the student.
        merge: an adapter added to its base: a model of its own. The average of ema="merged" always is one.
        base: of an adapter; None for the one that it names.
        dtype: of the weights of a whole model: "auto" (as saved; with LoRA that of the base), "float32", "bfloat16" or
            "float16". Averages are float32 and rounded to it once.
        trust_remote_code: run code that comes with the model.

    Raises:
        ValueError: no complete checkpoint, no average in it, one of another model, a folder that holds something, a
            `merge` with nothing to merge, too little room.
    """
    checkpoint, folder = _source(Path(source).expanduser(), ema), Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already: name a new folder, so that nothing is written over")
    _refuse_shards(checkpoint)
    adapted = is_adapter(checkpoint)
    if merge and not adapted:
        raise ValueError(f"{checkpoint} holds a whole model, not an adapter: there is nothing to merge")
    if base is not None and not adapted:
        raise ValueError(f"{checkpoint} holds a whole model, not an adapter: it has no base")
    average = read_average(checkpoint) if ema else None
    base = base or _base(checkpoint)
    model = _load(checkpoint, base if adapted else None, dtype, trust_remote_code)
    if average is not None:
        model = put_average(model, checkpoint)
    if merge and is_peft(model):
        model = model.merge_and_unload()
    adapter = is_peft(model)
    saved = [parameter for parameter in model.parameters() if not adapter or parameter.requires_grad]
    size = sum(parameter.numel() * parameter.element_size() for parameter in saved)
    check_room(folder, size, "the exported model")
    with replacing(folder) as new:
        model.save_pretrained(new)
        load_tokenizer(str(checkpoint), trust_remote_code=trust_remote_code).save_pretrained(new)
        if (checkpoint / FILE_NAME).is_file():
            shutil.copy(checkpoint / FILE_NAME, new / FILE_NAME)
        (new / "README.md").write_text(_card(folder.name, checkpoint, average, adapter), encoding="utf-8")
    return Exported(folder, checkpoint, average, adapter, size, base)


def _source(path: Path, ema: bool) -> Path:
    """The folder with the weights: a checkpoint, or of a run its final model unless a checkpoint is newer."""
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder: give that of a run, or one of its checkpoints")
    if is_checkpoint(path) or (path / MANIFEST).is_file():
        fault = fault_of(path)
        if fault is not None:
            raise ValueError(f"{path} is incomplete ({fault}): choose another checkpoint")
        if ema and read_average(path).global_step != _step(path):
            raise ValueError(f"{path} mixes two runs: its average is of another step; choose another checkpoint")
        return path
    newest = newest_complete(path)
    is_saved = (path / (STATE_FILE if ema else _STATE)).is_file()
    if is_saved and (newest is None or _saved_step(path, ema) >= _step(newest)):
        return path
    if newest is None:
        raise ValueError(
            f"{path} holds neither a finished model{' with a moving-average teacher' if ema else ''} nor a complete "
            "checkpoint"
        )
    return newest


def _refuse_shards(checkpoint: Path) -> None:
    if any(checkpoint.glob("pytorch_model_fsdp_*")):
        raise ValueError(
            f"{checkpoint} holds weights in shards (FSDP2): export the folder of the finished run, which has them "
            "whole, or resume the run and let it finish"
        )


def _step(folder: Path) -> int:
    return int(json.loads((folder / _STATE).read_text(encoding="utf-8"))["global_step"])


def _saved_step(folder: Path, ema: bool) -> int:
    return read_average(folder).global_step if ema else _step(folder)


def _load(checkpoint: Path, base: str | None, dtype: str, trust_remote_code: bool) -> Any:
    source = str(checkpoint) if base is None else resolve_model(base)
    # The class that the trainer makes, so that the names of the weights are the same.
    model: Any = create_model_from_path(source, dtype=dtype, device_map=None, trust_remote_code=trust_remote_code)
    if base is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(checkpoint), is_trainable=True)


def _base(checkpoint: Path) -> str | None:
    if is_adapter(checkpoint):
        return base_of(checkpoint)
    file = checkpoint / FILE_NAME
    settings = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return settings.get("model_name_or_path")


def _card(name: str, checkpoint: Path, average: Average | None, adapter: bool) -> str:
    """README.md of an exported model, with the metadata of the checkpoint's card."""
    card = checkpoint / "README.md"
    parts = card.read_text(encoding="utf-8").split("---\n", 2) if card.is_file() else []
    metadata = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else {}
    run = checkpoint.parent.name if is_checkpoint(checkpoint) else checkpoint.name
    metadata |= {"library_name": "peft" if adapter else "transformers", "model_name": name}
    if average is None:
        what = f"The student of `{run}`"
    else:
        what = (
            f"The moving-average teacher of `{run}` after {average.global_step} optimizer steps and "
            f"{average.updates} updates (ema `{average.mode}`)"
        )
    form = "as an adapter" if adapter else "as a whole model"
    head = yaml.safe_dump(metadata, sort_keys=False)
    return f"---\n{head}---\n# {name}\n\n{what}, {form}, written by `unisd export`. Settings: `{FILE_NAME}`.\n"


def describe(exported: Exported) -> str:
    """Lines for a terminal: what was written, and how to use it."""
    average = exported.average
    what = (
        "the student"
        if average is None
        else f"the teacher (ema={average.mode}, {average.updates} updates, step {average.global_step})"
    )
    form = "an adapter" if exported.adapter else "a whole model"
    against = "" if exported.adapter or exported.base is None else f" --base {exported.base}"
    return "\n".join(
        [
            f"{what} of {exported.checkpoint}, as {form} of {shown_size(exported.size)}: {exported.folder}",
            f"  evaluate  unisd eval retention --model {exported.folder}{against}",
            f'  load      model, tokenizer = unisd.load_model("{exported.folder}")',
        ]
    )
