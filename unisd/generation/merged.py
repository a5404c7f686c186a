"""Rollouts of an adapted model with the adapter added to its base: a sampled token costs what it costs the base.

A LoRA layer is three products instead of one, and a step of sampling is nothing but small products; what that costs is
in docs/training.md ("Rollouts").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from unisd.modules import is_peft

_PLAIN = (nn.Linear, Conv1D)


def merges_rollouts(args: Any, model: nn.Module, *, is_sharded: bool) -> bool:
    """Whether a run samples from merged weights: `args.merged_rollouts`, or where that is None on a CPU if it can be.

    Merged weights are a copy of the adapted ones, which a GPU may have no room for.

    Raises:
        ValueError: it was asked for and cannot be.
    """
    if args.merged_rollouts is False:
        return False
    reason = "vLLM samples, with weights of its own" if args.use_vllm else _why_not(model, is_sharded)
    if args.merged_rollouts is None:
        return reason is None and next(model.parameters()).device.type == "cpu"
    if reason is not None:
        raise ValueError(f"merged_rollouts=True cannot be: {reason}; leave it out")
    return True


def _why_not(model: nn.Module, is_sharded: bool) -> str | None:
    if not is_peft(model):
        return "the model has no PEFT adapter"
    if is_sharded:
        return "FSDP or ZeRO-3 shards the weights"
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    shared = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        base = layer.get_base_layer()
        if not isinstance(layer, LoraLayer) or type(base) not in _PLAIN:
            return f"{name} is not LoRA on a linear layer but {type(layer).__name__} on {type(base).__name__}"
        if shared[id(base.weight)] > 1:
            return f"{name} shares its weight with another module"
        if base.bias is None and any(layer.lora_bias.values()):
            return f"{name} has a bias in its adapter and none in its base"
    return None


@contextmanager
def merged_adapters(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Add the active LoRA adapters to their base weights, meanwhile.

    The base weights are put aside and come back bit by bit (subtracting the adapter again would round them at every
    step). Memory: a copy of the adapted weights. PEFT refuses an adapter that is not finite with a ValueError.

    Args:
        model: for which `merges_rollouts` holds.
        active: whether to do anything.
    """
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, LoraLayer)] if active else []
    with ExitStack() as back, torch.no_grad():
        for layer in layers:
            back.callback(_put_back, layer, [(p, p.data) for p in layer.get_base_layer().parameters()])
            layer.merge(safe_merge=True)  # safe: into new tensors
        yield


def _put_back(layer: Any, weights: list[tuple[nn.Parameter, torch.Tensor]]) -> None:
    layer.merged_adapters.clear()
    for parameter, data in weights:
        parameter.data = data
