"""Model card (README.md) of a trained model: its base, the recipe, and what the run measured."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from trl.trainer.utils import get_config_model_id

from unisd.models import FETCHED
from unisd.modules import is_peft
from unisd.presets import preset_fields
from unisd.run.settings import FILE_NAME

if TYPE_CHECKING:
    from unisd.trainer import UniSDTrainer

PAPER = {
    "title": "UniSD: Towards a Unified Self-Distillation Framework for Large Language Models",
    "id": "2605.06597",
    "citation": textwrap.dedent("""\
        @article{jin2026unisd,
            title  = {{UniSD: Towards a Unified Self-Distillation Framework for Large Language Models}},
            author = {Yiqiao Jin and others},
            year   = 2026,
            eprint = {arXiv:2605.06597},
        }"""),
}
"""The paper, as TRL's trainers name theirs."""

EVALUATIONS_BEGIN, EVALUATIONS_END = "<!-- evaluations -->", "<!-- end of the evaluations -->"
"""What `unisd eval -o RUN/eval` writes stands between them; weights that are saved have none yet."""
_PACKAGES = ("unisd-kernels", "torch", "transformers", "trl", "peft", "datasets")
_RECIPE = (
    *sorted(preset_fields() - {"num_train_epochs", "max_prompt_length", "max_completion_length"}),
    "temperature",
    "num_auxiliary",
    "agreement_statistic",
    "agreement_fraction",
    "clip_quantile",
    "batch_statistics",
)
_OPTIMIZATION = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_completion_length",
    "seed",
)
_SHOWN_METRICS = (
    "loss",
    "eval_loss",
    "unisd/divergence",
    "unisd/clipped_share",
    "unisd/agreement_weight",
    "unisd/contrastive",
    "unisd/feature_distance",
    "unisd/student_entropy",
    "unisd/teacher_entropy",
    "completions/mean_length",
)


def model_card(
    trainer: UniSDTrainer,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
) -> str:
    """The card of the trainer's model as it is now, with YAML metadata in front.

    Args:
        model_name: default: the name of the output folder.
        dataset_name: default: the dataset of `trainer.recorded_settings`, if it is known.
        tags: more tags for the metadata.
    """
    args = trainer.args
    name = model_name or (args.hub_model_id or Path(str(args.output_dir)).name)
    dataset = dataset_name or _without_folder(trainer.recorded_settings.get("dataset"))
    base, is_on_hub = _base_model(trainer)
    base_text = f"[{base}](https://huggingface.co/{base})" if is_on_hub else f"`{base}`"
    adapter = is_peft(trainer.accelerator.unwrap_model(trainer.model))
    lines = [
        _front_matter(name, base if is_on_hub else None, adapter, [*trainer._tag_names, *_listed(tags)]),
        f"# {name}",
        "",
        f"{'A PEFT adapter for' if adapter else 'A fine-tuned version of'} {base_text}, trained by self-distillation "
        f"with UniSD ([arXiv:{trainer._paper['id']}](https://arxiv.org/abs/{trainer._paper['id']}))"
        + (f" on `{dataset}`." if dataset else "."),
        "The teacher is the model itself, under a context that the student does not see.",
        "",
        "## Recipe",
        "",
        f"Preset `{args.preset}`; {trainer.state.global_step} optimizer steps. All settings: `{FILE_NAME}`.",
        "",
        *table(("setting", "value"), [(f"`{key}`", _setting(trainer, key)) for key in _RECIPE + _OPTIMIZATION]),
        "",
        "## Metrics",
        "",
        *_metrics(trainer.state.log_history),
        "",
        "## Drift from the base model",
        "",
        *_drift(trainer.state.log_history),
        "",
        "## Evaluations",
        "",
        EVALUATIONS_BEGIN,
        "Not evaluated yet: `unisd eval procedural drift retention behaviour --model RUN -o RUN/eval` writes it here.",
        EVALUATIONS_END,
        "",
        "## Versions",
        "",
        ", ".join(f"{package} {_version(package)}" for package in _PACKAGES),
        "",
        "## Citation",
        "",
        "```bibtex",
        str(trainer._paper["citation"]).strip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def write_model_card(folder: str | os.PathLike[str], text: str) -> Path:
    """Write README.md into `folder` and return its path."""
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _without_folder(dataset: str | None) -> str | None:
    """Name of a dataset without the folder of a file, nobody else's business; the owner of one of the hub stays."""
    return Path(dataset).name if dataset and Path(dataset).expanduser().is_file() else dataset


def _setting(trainer: UniSDTrainer, name: str) -> str:
    value = _shown(getattr(trainer.args, name))
    return f"{value} ({trainer.teacher.mode})" if name == "ema" and value != trainer.teacher.mode else value


def _base_model(trainer: UniSDTrainer) -> tuple[str, bool]:
    """Name of the model before training, and whether it is an id of the hub."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if is_peft(model):
        model = model.get_base_model()  # type: ignore[operator]
    name = str(get_config_model_id(model.config) or "")
    if not name:
        return f"{type(model).__name__} built in Python", False
    # Converted here from the published model; the folder in a user's cache means nothing to a reader of the card.
    if Path(name).name in FETCHED:
        return FETCHED[Path(name).name].hub_id, True
    if Path(name).is_dir() or name.count("/") > 1:
        return Path(name).name, False
    return name, True


def _front_matter(name: str, base: str | None, adapter: bool, tags: list[str]) -> str:
    data: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "model_name": name}
    if base is not None:
        data["base_model"] = base
    data["tags"] = ["generated_from_trainer", *tags]
    return f"---\n{yaml.safe_dump(data, sort_keys=False)}---\n"


def _listed(tags: str | list[str] | None) -> list[str]:
    return [tags] if isinstance(tags, str) else list(tags or ())


def _metrics(history: list[dict[str, Any]]) -> list[str]:
    rows = []
    for name in _SHOWN_METRICS:
        values = [(entry["step"], entry[name]) for entry in history if name in entry]
        if values:
            (first_step, first), (last_step, last) = values[0], values[-1]
            rows.append((f"`{name}`", f"{_shown(first)} (step {first_step})", f"{_shown(last)} (step {last_step})"))
    return table(("metric", "first logged", "last logged"), rows) if rows else ["Nothing was logged."]


def _drift(history: list[dict[str, Any]]) -> list[str]:
    name = "unisd/drift_kl"
    points = [(entry["step"], entry[name]) for entry in history if name in entry]
    if not points:
        return ["Not measured."]
    highest = max((value for _, value in points if math.isfinite(value)), default=math.nan)
    return [
        "KL(base || this model) in nats a token, on a fixed chat probe that has nothing to do with the training data: "
        f"{_shown(points[-1][1])} at step {points[-1][0]}, at most {_shown(highest)}.",
        "",
        *table(("step", "drift"), [(str(step), _shown(value)) for step, value in _at_most(points, 12)]),
    ]


def _at_most(points: list[tuple[int, float]], count: int) -> list[tuple[int, float]]:
    """At most `count` points, evenly spaced, the last one included."""
    if len(points) <= count:
        return points
    return [points[round(place * (len(points) - 1) / (count - 1))] for place in range(count)]


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a Markdown table."""
    return [_row(head), _row(("---",) * len(head)), *map(_row, rows)]


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(getattr(value, "value", value))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"
