"""Settings of `unisd train` outside of `UniSDConfig` that follow from the preset: LoRA, micro-batch and contexts of the
paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unisd.models import SMOLLM2, is_adapter, resolve_model
from unisd.presets import PAPER_LORA, is_paper, paper_micro_batch


def preset_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of settings that nobody gave.

    Args:
        given: by name, from file and command line.
    """
    preset = str(given.get("preset", "unisd_star"))
    if not is_paper(preset):
        return {}
    name = str(given.get("model_name_or_path") or SMOLLM2)
    defaults: dict[str, Any] = {**PAPER_LORA, "contexts": "retrieval"}
    if given.get("use_peft") is False:
        defaults = {key: value for key, value in defaults.items() if key not in PAPER_LORA}
    if not is_adapter(name):  # which is refused later, with a better message
        defaults["per_device_train_batch_size"] = paper_micro_batch(preset, num_parameters(name, given))
    return defaults


def num_parameters(name: str, given: Mapping[str, Any]) -> int:
    """Number of parameters of a model, from its configuration alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = bool(given.get("trust_remote_code", False))
    config = AutoConfig.from_pretrained(
        resolve_model(name), revision=given.get("model_revision", "main"), trust_remote_code=trust
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    return sum(parameter.numel() for parameter in model.parameters())
