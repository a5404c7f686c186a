"""Ranges of numbers of `transformers.TrainingArguments` and `trl.DistillationConfig` that only a mistake can leave.

Neither checks them: a negative batch size fails somewhere in a data loader, a negative learning rate trains upwards.
"""

from __future__ import annotations

import math
from typing import Any

from unisd_kernels.config import check_number

_ABOVE_ZERO: dict[str, Any] = {"low": 0.0, "open_low": True}
_FROM_ZERO: dict[str, Any] = {"low": 0.0}
_SHARE: dict[str, Any] = {"low": 0.0, "high": 1.0}

RANGES: dict[str, dict[str, Any]] = {
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": _FROM_ZERO,
    "dataloader_num_workers": _FROM_ZERO,
    "gradient_accumulation_steps": _ABOVE_ZERO,
    "learning_rate": _FROM_ZERO,
    "logging_steps": _FROM_ZERO,
    "max_completion_length": _ABOVE_ZERO,
    "max_grad_norm": _FROM_ZERO,
    "min_p": _SHARE,
    "per_device_eval_batch_size": _ABOVE_ZERO,
    "per_device_train_batch_size": _ABOVE_ZERO,
    "repetition_penalty": _ABOVE_ZERO,
    "save_total_limit": _FROM_ZERO,
    "seed": {"low": 0.0, "high": float(2**32 - 1)},
    "top_k": _FROM_ZERO,
    "top_p": {**_SHARE, "open_low": True},
    "vllm_gpu_memory_utilization": {**_SHARE, "open_low": True},
    "vllm_tensor_parallel_size": _ABOVE_ZERO,
    "warmup_steps": _FROM_ZERO,
    "weight_decay": _FROM_ZERO,
}
"""Field -> keyword arguments of `check_number`; None passes where the field may be None."""


def check_ranges(config: Any) -> None:
    """Raise ValueError or TypeError for a field outside its range.

    Args:
        config: a `trl.DistillationConfig`.
    """
    for name, bounds in RANGES.items():
        value = getattr(config, name)
        if value is not None:
            check_number(name, value, **bounds)
    # -1 is the one negative number with a meaning: as many steps as the epochs have.
    if config.max_steps == 0 or config.max_steps < -1:
        raise ValueError(
            f"max_steps must be above 0, or -1 for as many as num_train_epochs make, got {config.max_steps}"
        )
    if config.max_steps == -1 and not (0 < config.num_train_epochs < math.inf):
        raise ValueError(f"num_train_epochs must be a number above 0, got {config.num_train_epochs}")
    for name in ("save_steps", "eval_steps"):
        value = getattr(config, name)
        if value is not None and not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
