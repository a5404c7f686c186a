"""Refusal of settings of `unisd train` that would do nothing, or nothing sensible, before anything is loaded.

TRL's and transformers' dataclasses hold settings that this trainer never reads: they would be accepted in silence.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.integrations import get_available_reporting_integrations

from unisd.cli.errors import CommandError
from unisd.liger import why_no_liger
from unisd.models import FETCHED

_NO_PREDICTIONS = "an evaluation computes losses only; use `unisd eval` for scores of replies"
_OWN_LOSS = "the loss is UniSD's own"
_COMPILE = "the trainer runs the parts of the model that torch.compile is not applied to, so nothing would be compiled"

WITHOUT_EFFECT = {
    "average_tokens_across_devices": "the loss is always that of the batch of all devices",
    "auto_find_batch_size": "rollouts are made for a fixed batch size; set per_device_train_batch_size",
    "batch_eval_metrics": _NO_PREDICTIONS,
    "data_seed": "the order of the rows follows seed",
    "do_eval": "set eval_split or eval_file, and eval_strategy",
    "do_predict": "use `unisd eval`",
    "do_train": "this command always trains",
    "eval_accumulation_steps": _NO_PREDICTIONS,
    "eval_do_concat_batches": _NO_PREDICTIONS,
    "eval_use_gather_object": _NO_PREDICTIONS,
    "include_for_metrics": _NO_PREDICTIONS,
    "include_num_input_tokens_seen": "tokens are logged as num_tokens",
    "label_names": "rows have no labels",
    "label_smoothing_factor": _OWN_LOSS,
    "length_column_name": "rows are not grouped by length",
    "local_rank": "the launcher sets it (LOCAL_RANK)",
    "lora_task_type": "only causal language models can be trained",
    "max_tool_calling_iterations": "tools can be given in Python only (UniSDTrainer(tools=...))",
    "parallelism_config": "give it to UniSDConfig in Python, or use `accelerate config`",
    "prediction_loss_only": _NO_PREDICTIONS,
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "train_sampling_strategy": "the order of the rows is random; shuffle_dataset=false keeps that of the file",
    "use_cache": "training passes never use a cache, rollouts always do",
}
"""Setting -> why a value other than the default does nothing here, and what to do instead."""

# Tracker -> its package. Those that the list leaves out are transformers' to check.
_TRACKERS = {
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet-ml",
    "dvclive": "dvclive",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}


def _needs(name: str, value: object = True) -> tuple[str, Callable[[Mapping[str, Any]], bool]]:
    text = name if value is True else f"{name}={value}"
    return text, lambda settings: settings[name] is True if value is True else settings[name] == value


RAW_ROWS = (
    "prompt_column",
    "answer_column",
    "choices_column",
    "tests_column",
    "explanation_column",
    "task",
    "contexts",
    "negatives",
    "demos_per_context",
    "context_pool",
    "generator",
    "unsafe_code",
)
"""Settings of how rows of questions and answers are prepared."""

GENERATED = ("procedural", "diagnostic")
"""Sources that are no file, folder or dataset."""

NEEDS = {
    **dict.fromkeys(RAW_ROWS, ("a dataset of questions and answers", lambda s: s["dataset"] not in GENERATED)),
    **dict.fromkeys(
        (
            "lora_r",
            "lora_alpha",
            "lora_dropout",
            "lora_target_modules",
            "lora_target_parameters",
            "lora_modules_to_save",
            "use_rslora",
            "use_dora",
            "load_in_4bit",
            "load_in_8bit",
        ),
        _needs("use_peft"),
    ),
    **dict.fromkeys(("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"), _needs("load_in_4bit")),
    **dict.fromkeys(
        ("procedural_rows", "procedural_steps", "procedural_look_back"),
        ("dataset=procedural or diagnostic", lambda s: s["dataset"] in GENERATED),
    ),
    **dict.fromkeys(("num_completions_to_print", "log_unique_prompts"), _needs("log_completions")),
    **dict.fromkeys(
        (
            "vllm_mode",
            "vllm_model_impl",
            "vllm_enable_sleep_mode",
            "vllm_structured_outputs_regex",
            "vllm_server_base_url",
            "vllm_server_host",
            "vllm_server_port",
            "vllm_server_timeout",
            "vllm_group_port",
            "vllm_gpu_memory_utilization",
            "vllm_max_model_length",
            "vllm_tensor_parallel_size",
            "vllm_importance_sampling_correction",
        ),
        _needs("use_vllm"),
    ),
    **dict.fromkeys(
        ("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
        ("use_vllm and vllm_mode=server", lambda s: s["use_vllm"] and s["vllm_mode"] == "server"),
    ),
    "vllm_importance_sampling_clip_max": _needs("vllm_importance_sampling_correction"),
    **dict.fromkeys(
        (
            "view_scorer_url",
            "view_scorer_model",
            "view_scorer_concurrency",
            "view_scorer_timeout",
            "view_scorer_patience",
        ),
        _needs("view_scorer", "server"),
    ),
    "liger_kernel_config": _needs("use_liger_kernel"),
    "fsdp_config": ("fsdp", lambda settings: bool(settings["fsdp"])),
    "ds3_gather_for_generation": ("deepspeed", lambda settings: bool(settings["deepspeed"])),
    "eval_steps": _needs("eval_strategy", "steps"),
    "save_steps": ("save_strategy=steps", lambda settings: settings["save_strategy"] in ("steps", "best")),
    "logging_steps": _needs("logging_strategy", "steps"),
    "trackio_space_id": ("report_to=trackio", lambda settings: "trackio" in settings["report_to"]),
    "trackio_bucket_id": ("report_to=trackio", lambda settings: "trackio" in settings["report_to"]),
    "trackio_static_space_id": ("report_to=trackio", lambda settings: "trackio" in settings["report_to"]),
    "run_name": ("report_to", lambda settings: bool(settings["report_to"])),
    "project": ("report_to=trackio", lambda settings: "trackio" in settings["report_to"]),
    **dict.fromkeys(
        ("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
        _needs("push_to_hub"),
    ),
    **dict.fromkeys(
        ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context"),
        ("dataloader_num_workers above 0", lambda settings: settings["dataloader_num_workers"] > 0),
    ),
}
"""Setting -> (the setting that it needs in words, whether that is so)."""


def check_settings(instances: list[Any], given: Mapping[str, Any]) -> None:
    """Raise CommandError, one line, if something that was given would have no effect or makes no sense.

    Args:
        instances: the dataclasses as they were built.
        given: names and values that the user gave.
    """
    settings, defaults = {}, {}
    for instance in instances:
        for field in dataclasses.fields(instance):
            settings[field.name] = getattr(instance, field.name)
            defaults[field.name] = (
                field.default_factory() if callable(field.default_factory) else field.default  # type: ignore[misc]
            )
    # As given, and as resolved: no and False may be two spellings of a default.
    changed = [name for name, value in given.items() if defaults[name] not in (value, settings[name])]
    for name in changed:
        if name in WITHOUT_EFFECT:
            raise CommandError(f"{name}={given[name]} has no effect in unisd train: {WITHOUT_EFFECT[name]}")
        if name in NEEDS:
            needed, holds = NEEDS[name]
            if not holds(settings):
                raise CommandError(f"{name}={given[name]} has no effect without {needed}")
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")
        if old in given and new in given and given[old] != given[new]:
            raise CommandError(f"{old}={given[old]} and {new}={given[new]} contradict each other: they are one setting")
    _check_model(settings)
    _check_trackers(settings["report_to"])


def _check_trackers(names: list[str]) -> None:
    """Raise CommandError for a tracker whose package is missing."""
    installed = get_available_reporting_integrations()
    for name in names:
        if name in _TRACKERS and name not in installed:
            raise CommandError(f"report_to={name} needs a package that is not installed: pip install {_TRACKERS[name]}")


def _check_model(settings: Mapping[str, Any]) -> None:
    name = settings["model_name_or_path"]
    if not name:
        raise CommandError("model_name_or_path is empty: give a model id or a local folder")
    for number, holds, wanted in (
        ("lora_r", settings["lora_r"] > 0, "above 0"),
        ("lora_alpha", settings["lora_alpha"] > 0, "above 0"),
        ("lora_dropout", 0 <= settings["lora_dropout"] < 1, "in [0, 1["),
        ("procedural_rows", settings["procedural_rows"] > 0, "above 0"),
    ):
        if not holds:
            raise CommandError(f"{number} must be {wanted}, got {settings[number]}")
    if settings["use_liger_kernel"] and (reason := why_no_liger(settings["use_cpu"])):
        raise CommandError(f"use_liger_kernel: {reason}")
    quantized = [bits for bits in ("load_in_4bit", "load_in_8bit") if settings[bits]]
    if quantized:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise CommandError(f"{quantized[0]} needs the package bitsandbytes: pip install bitsandbytes")
        if settings["dtype"] == "auto":
            raise CommandError(f"{quantized[0]} needs a dtype to compute in: --dtype bfloat16, float16 or float32")
    storage = settings["bnb_4bit_quant_storage"]
    if storage not in (None, "uint8", "float16", "bfloat16", "float32"):
        raise CommandError(f"bnb_4bit_quant_storage must be uint8, float16, bfloat16 or float32, got {storage!r}")
    if settings["model_revision"] != "main" and (name in FETCHED or Path(name).expanduser().is_dir()):
        raise CommandError(
            f"model_revision={settings['model_revision']} has no effect on {name}, which is a folder here: only "
            "model ids have revisions"
        )
