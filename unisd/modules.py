"""Parts and modes of a model: is it PEFT, its backbone, its head, where its inputs belong, eval mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn

from unisd_kernels import LMHead
from unisd_kernels.heads.causal_model import backbone, causal_model, evaluating, head_module, head_parts, is_peft

__all__ = [
    "HiddenStates",
    "backbone",
    "evaluating",
    "has_dropout",
    "head_is_trained",
    "hidden_before",
    "is_peft",
    "model_device",
    "model_head",
    "remember_head",
    "scoring_mode",
    "takes_position_ids",
    "verified_softcap",
]

HiddenStates = Callable[[nn.Module, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(model, input ids [B, L], attention mask [B, L], number T of last positions) -> [B, T, H], the state before each."""


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
    form = {"logit_scale": found.logit_scale, "softcap": found.softcap, "vocab_size": found.vocab_size}
    return LMHead(**head_parts(model)._asdict(), **form)


def remember_head(model: Any, logit_scale: float, softcap: float | None, vocab_size: int | None) -> None:
    """Make `model_head` use this scale, cap and vocabulary from now on."""
    causal_model(model)._unisd_head = _Remembered(_bare_head(model), logit_scale, softcap, vocab_size)


def verified_softcap(model: Any) -> float | None:
    """Soft cap of a head that `model_head` or `remember_head` knows; also where its weight is in shards."""
    found = getattr(causal_model(model), "_unisd_head", None)
    return model_head(model).softcap if found is None else found.softcap


def head_is_trained(model: Any) -> bool:
    """Whether the output head gets a gradient."""
    return any(parameter.requires_grad for parameter in model.get_output_embeddings().parameters())


def takes_position_ids(model: Any) -> bool:
    """Whether the backbone takes `position_ids`; to be asked before a wrapper of FSDP hides its signature."""
    return "position_ids" in signature(backbone(model).forward).parameters


def hidden_before(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_tokens: int, *, takes_positions: bool
) -> torch.Tensor:
    """[B, T, H] hidden states that predict the last T = `num_tokens` tokens of left-padded rows [B, L].

    Positions are counted from the first real token. With relative positions (RoPE) that changes nothing but rounding;
    with learned ones the padding of a batch would shift every row.
    """
    positions = {}
    if takes_positions:
        positions["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    hidden = backbone(model)(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions
    ).last_hidden_state
    # The state before a token predicts it; the last one predicts nothing that was sampled.
    return hidden[:, -(num_tokens + 1) : -1]


def has_dropout(model: Any) -> bool:
    """Whether a training pass of the model is a random one."""
    modules = any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in model.modules())
    return modules or bool(getattr(backbone(model).config, "attention_dropout", 0.0))


def model_device(model: Any) -> torch.device:
    """Device where the inputs of the model belong."""
    return model.get_input_embeddings().weight.device


@contextmanager
def scoring_mode(model: Any) -> Iterator[None]:
    """Eval mode and no gradients; afterwards every module is back in the mode it was in."""
    with evaluating(model), torch.no_grad():
        yield


def _bare_head(model: Any) -> nn.Module:
    """The head's module, the same before and after FSDP has wrapped it."""
    head: Any = head_module(model)
    return getattr(head, "_fsdp_wrapped_module", head)
