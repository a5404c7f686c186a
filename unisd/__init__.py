"""UniSD self-distillation on language models: the trainer and what surrounds it (arXiv 2605.06597).

Importing this package loads neither torch nor TRL; each name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unisd.completions import CompletionBatch, completion_batch, hidden_rows
    from unisd.config import UniSDConfig
    from unisd.drift import DriftProbe
    from unisd.loss import self_distillation_loss
    from unisd.models import fetch_model, load_model
    from unisd.presets import PRESETS, Preset
    from unisd.trainer import UniSDTrainer

_MODULES = {
    "PRESETS": "unisd.presets",
    "CompletionBatch": "unisd.completions",
    "DriftProbe": "unisd.drift",
    "Preset": "unisd.presets",
    "UniSDConfig": "unisd.config",
    "UniSDTrainer": "unisd.trainer",
    "completion_batch": "unisd.completions",
    "fetch_model": "unisd.models",
    "hidden_rows": "unisd.completions",
    "load_model": "unisd.models",
    "self_distillation_loss": "unisd.loss",
}

__all__ = [
    "PRESETS",
    "CompletionBatch",
    "DriftProbe",
    "Preset",
    "UniSDConfig",
    "UniSDTrainer",
    "completion_batch",
    "fetch_model",
    "hidden_rows",
    "load_model",
    "self_distillation_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'unisd' has no attribute {name!r}")
    try:
        module = importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        if error.name in ("accelerate", "datasets", "peft", "transformers", "trl"):
            raise ImportError(f"unisd.{name} needs {error.name}: pip install 'unisd-kernels[train]'") from error
        raise
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
