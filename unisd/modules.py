"""What trainer, teachers and evaluation all ask of a model: is it PEFT, where is its backbone, eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def is_peft(model: Any) -> bool:
    """Whether the model is a PEFT model (adapter around a base)."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def backbone(model: Any) -> Any:
    """The decoder of a causal language model, without its head: what gives the last hidden state.

    Raises:
        ValueError: a model that cannot be run without its head, or a prompt-learning adapter (its virtual tokens would
            be left out silently).
    """
    causal = model
    if is_peft(model):
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            raise ValueError(
                "prompt-learning adapters (prefix, prompt or p-tuning) are not supported, only LoRA-like ones."
            )
        causal = model.get_base_model()
    decoder = getattr(causal, "base_model", causal)
    if decoder is causal:
        raise ValueError(f"{type(causal).__name__} has no backbone apart from its head (`base_model`).")
    return decoder


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for every module; modules that were in training mode, and only those, go back to it."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
