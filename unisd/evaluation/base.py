"""The base that a trained model is compared with: another model, or the same one without its adapter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from unisd.modules import is_peft


def base_of(model: Any, base_model: Any) -> tuple[Any, Callable[[], AbstractContextManager[Any]]]:
    """The base, and a context in which it is one: with a PEFT model and no `base_model` both are the same module, whose
    adapter the context switches off.

    Raises:
        ValueError: no `base_model`, and no adapter that could be switched off.
    """
    if base_model is not None:
        return base_model, nullcontext
    if not is_peft(model):
        raise ValueError(
            "base_model is None and the model has no PEFT adapter that could be switched off: pass the model as it was "
            "before training as base_model=."
        )
    return model, model.disable_adapter
