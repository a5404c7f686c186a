"""UniSD self-distillation on language models: the trainer and what surrounds it (arXiv 2605.06597).

Importing this package loads neither torch nor TRL; each name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unisd.config import UniSDConfig
    from unisd.drift import DriftProbe
    from unisd.models import load_model
    from unisd.presets import PRESETS, Preset
    from unisd.smollm2 import fetch_smollm2
    from unisd.trainer import UniSDTrainer

_MODULES = {
    "PRESETS": "unisd.presets",
    "DriftProbe": "unisd.drift",
    "Preset": "unisd.presets",
    "UniSDConfig": "unisd.config",
    "UniSDTrainer": "unisd.trainer",
    "fetch_smollm2": "unisd.smollm2",
    "load_model": "unisd.models",
}

__all__ = ["PRESETS", "DriftProbe", "Preset", "UniSDConfig", "UniSDTrainer", "fetch_smollm2", "load_model"]


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
