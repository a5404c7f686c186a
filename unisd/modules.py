"""What trainer, teachers and evaluation all ask of a model: is it PEFT, where is its backbone, its head, eval mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from unisd_kernels import LMHead
from unisd_kernels.heads.causal_model import backbone, causal_model, evaluating, head_module, head_tensors, is_peft

__all__ = ["backbone", "evaluating", "is_peft", "model_head", "remember_head"]


@dataclass(frozen=True)
class _Remembered:
    """Scale, cap and vocabulary of a head that was verified. It holds no weight, and a deep copy of the model copies it
    with the module it belongs to."""

    module: nn.Module
    logit_scale: float
    softcap: float | None
    vocab_size: int | None


def model_head(model: Any) -> LMHead:
    """The head of a model with its weights as they are now.

    The first call verifies it (`LMHead.from_model`), and what it found stays with the model and with deep copies of it,
    so that a head for every step costs nothing. A model whose head module has been replaced is verified anew.

    Raises:
        ValueError: as `LMHead.from_model`.
    """
    found = getattr(causal_model(model), "_unisd_head", None)
    if found is None or found.module is not _bare_head(model):
        head = LMHead.from_model(model)
        remember_head(model, head.logit_scale, head.softcap, head.vocab_size)
        return head
    weight, bias = head_tensors(model)
    return LMHead(weight, bias, found.logit_scale, found.softcap, found.vocab_size)


def remember_head(model: Any, logit_scale: float, softcap: float | None, vocab_size: int | None) -> None:
    """Let `model_head` use this scale, cap and vocabulary from now on."""
    causal_model(model)._unisd_head = _Remembered(_bare_head(model), logit_scale, softcap, vocab_size)


def _bare_head(model: Any) -> nn.Module:
    """The head's module, the same before and after FSDP has wrapped it."""
    head: Any = head_module(model)
    return getattr(head, "_fsdp_wrapped_module", head)
