"""Liger's fused kernels in the backbone: norms, rotary embeddings, feed-forward. No loss of Liger's."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import torch

_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")


def liger_settings(given: Mapping[str, bool] | None) -> dict[str, bool]:
    """The `liger_kernel_config` of a run: what was given, and no loss.

    Raises:
        ValueError: a loss of Liger's was asked for.
    """
    asked = [name for name in _LOSSES if (given or {}).get(name)]
    if asked:
        raise ValueError(f"liger_kernel_config has {asked[0]}=true, but the loss is UniSD's own: leave it out")
    return {**(given or {}), **dict.fromkeys(_LOSSES, False)}


def why_no_liger(use_cpu: bool = False) -> str | None:
    """Reason why Liger's kernels cannot run here, in words; None if they can.

    Args:
        use_cpu: the run is on the CPU, also where there is a GPU.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        return "it needs the package liger-kernel: pip install liger-kernel"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if (use_cpu or not torch.accelerator.is_available()) and not interpreted:
        return "its kernels are Triton's and need a GPU; leave it out on a CPU"
    return None


def use_liger(model: Any, settings: Mapping[str, bool], *, use_cpu: bool = False) -> None:
    """Put Liger's kernels into a model, in place. Before it is copied, so that a teacher has them too.

    Args:
        model: the student, with or without an adapter.
        settings: see `liger_settings`.

    Raises:
        ValueError: the kernels cannot run here, or there are none for this kind of model.
    """
    reason = why_no_liger(use_cpu)
    if reason is not None:
        raise ValueError(f"use_liger_kernel: {reason}")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel
    from transformers.trainer_utils import unwrap_peft_model

    kind = unwrap_peft_model(model).config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(f"use_liger_kernel: Liger has no kernels for models of type {kind!r}; leave the flag out")
    apply_liger_kernel(model, dict(settings))
