"""What `unisd train` says at the end: what came out, where it is, what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from unisd.drift.schedule import NAME as DRIFT
from unisd.modules import is_peft
from unisd.prepare.folder import is_prepared
from unisd.presets import get_preset
from unisd.run.settings import FILE_NAME
from unisd.teachers import EMATeacher

if TYPE_CHECKING:
    from unisd.trainer import UniSDTrainer


def summary(trainer: UniSDTrainer, dataset: str, scores: Mapping[str, float]) -> list[str]:
    """Lines for a terminal.

    Args:
        dataset: as it was given.
        scores: of the evaluation after training, if there was one.
    """
    args, history = trainer.args, trainer.state.log_history
    folder = Path(str(args.output_dir))
    adapter = is_peft(trainer.accelerator.unwrap_model(trainer.model))
    lines = ["", f"{args.preset}: {get_preset(args.preset).description}"]
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if losses:
        (first, begin), (last, end) = losses[0], losses[-1]
        lines.append(
            f"  loss    {begin:.4g} (step {first}) -> {end:.4g} (step {last}), {trainer.state.global_step} steps"
        )
    drift = [entry[DRIFT] for entry in history if DRIFT in entry]
    if drift:
        lines.append(f"  drift     {drift[-1]:.3g} nats a token from the model before training, on chat")
    lines += [f"  {name:<9} {value:.4g}" for name, value in sorted(scores.items()) if name == "eval_loss"]
    places: dict[str, object] = {
        "adapter" if adapter else "model": folder,
        "card": folder / "README.md",
        "settings": folder / FILE_NAME,
    }
    if isinstance(trainer.teacher, EMATeacher):
        places["teacher"] = f"{folder} (its moving average)"
    if args.report_to:
        places["logs"] = ", ".join(args.report_to)
    lines += ["", "where things are", *(f"  {name:<9} {place}" for name, place in places.items())]
    lines += ["", "next", f"  unisd eval retention --model {folder}"]
    if isinstance(trainer.teacher, EMATeacher):
        lines.append(f"  unisd export --ema {folder} -o {folder}-teacher")
    if is_prepared(dataset):
        lines.append(f"  unisd show {dataset} --row 0")
    lines.append(f"  python -c \"from unisd import load_model; model, tokenizer = load_model('{folder}')\"")
    return lines
