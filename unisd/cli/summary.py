"""What `unisd train` says at the end: what came out, where it is, what to do next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from unisd.benchmarks import is_benchmark
from unisd.cli.checks import GENERATED
from unisd.drift.schedule import NAME as DRIFT
from unisd.evaluation.folder import EVALUATIONS
from unisd.modules import is_peft
from unisd.presets import get_preset
from unisd.run.checkpoints import newest_complete
from unisd.run.settings import FILE_NAME
from unisd.teachers import EMATeacher

if TYPE_CHECKING:
    from unisd.trainer import UniSDTrainer

_LOG = "trainer_state.json"


def summary(trainer: UniSDTrainer, model: str, dataset: str, prepared: Path | None = None) -> str:
    """Lines for a terminal.

    Args:
        model: name of the model before training.
        dataset: source of the rows.
        prepared: folder of the rows, where `unisd show` can read them.
    """
    sections = [
        (f"{trainer.args.preset}: {get_preset(trainer.args.preset).description}", _results(trainer)),
        ("where things are", _places(trainer, prepared)),
        ("next", _commands(trainer, model, dataset, prepared)),
    ]
    width = max(len(name) for _, lines in sections for name in lines)
    texts = []
    for head, lines in sections:
        texts += ["", head, *(f"  {name:<{width}}  {text}" for name, text in lines.items())]
    return "\n".join(texts)


def _results(trainer: UniSDTrainer) -> dict[str, str]:
    history = trainer.state.log_history
    lines = {}
    for name, key, unit in (
        ("loss", "loss", ""),
        ("eval loss", "eval_loss", ""),
        ("drift", DRIFT, " nats a token from the model before training, on chat"),
    ):
        values = [(entry["step"], entry[key]) for entry in history if key in entry]
        if values:
            (_, begin), (last, end) = values[0], values[-1]
            first = "" if key == DRIFT or len(values) == 1 else f"{begin:.4g} -> "
            lines[name] = f"{first}{end:.4g}{unit} (step {last} of {trainer.state.max_steps})"
    return lines


def _places(trainer: UniSDTrainer, prepared: Path | None) -> dict[str, str]:
    args = trainer.args
    folder = Path(str(args.output_dir))
    lines = {"adapter" if _is_adapter(trainer) else "model": str(folder)}
    if isinstance(trainer.teacher, EMATeacher):
        lines["teacher"] = f"{folder} (its moving average)"
    newest = newest_complete(folder)
    if newest is not None:
        lines["checkpoint"] = str(newest)
    lines |= {"card": str(folder / "README.md"), "settings": str(folder / FILE_NAME), "log": str(folder / _LOG)}
    if args.log_completions:
        lines["completions"] = str(folder / "completions")
    if prepared is not None:
        lines["rows"] = str(prepared)
    others = [name for name in _trackers(trainer) if name not in ("tensorboard", "trackio")]
    if others:
        lines["tracker"] = ", ".join(others)
    return lines


def _commands(trainer: UniSDTrainer, model: str, dataset: str, prepared: Path | None) -> dict[str, str]:
    args = trainer.args
    folder = str(args.output_dir)
    quoted = shlex.quote(folder)
    against = "" if _is_adapter(trainer) else f" --base {shlex.quote(model)}"
    lines = {}
    if dataset in GENERATED or is_benchmark(dataset):
        lines["evaluate"] = f"unisd eval {dataset} --model {quoted}"
    evaluations = shlex.quote(f"{folder.rstrip('/')}/{EVALUATIONS}")
    lines["drift"] = f"unisd eval retention drift behaviour --model {quoted}{against} -o {evaluations}"
    lines["page"] = f"unisd compare {quoted}"
    if isinstance(trainer.teacher, EMATeacher):
        lines["teacher"] = f"unisd export --ema {quoted} -o {shlex.quote(folder.rstrip('/') + '-teacher')}"
    if _is_adapter(trainer):
        lines["merge"] = f"unisd export --merge {quoted} -o {shlex.quote(folder.rstrip('/') + '-merged')}"
    if prepared is not None:
        lines["look"] = f"unisd show {shlex.quote(str(prepared))} --row 0"
    if "tensorboard" in _trackers(trainer):
        lines["plots"] = f"tensorboard --logdir {shlex.quote(str(Path(folder) / 'runs'))}"
    if "trackio" in _trackers(trainer):
        lines["plots"] = f"trackio show --project {shlex.quote(str(args.project))}"
    lines["load"] = f'from unisd import load_model; model, tokenizer = load_model("{folder}")'
    return lines


def _trackers(trainer: UniSDTrainer) -> list[str]:
    return list(trainer.args.report_to or ())


def _is_adapter(trainer: UniSDTrainer) -> bool:
    return is_peft(trainer.accelerator.unwrap_model(trainer.model))
