"""Base, backbone, head and mode of a Hugging Face causal language model, without importing transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_peft(model: Any) -> bool:
    """Whether the model is a PEFT model (adapter around a base)."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def causal_model(model: Any) -> Any:
    """The causal language model itself: out of PEFT's and torch.compile's wrappers.

    Raises:
        ValueError: a prompt-learning adapter (its virtual tokens would be left out silently).
    """
    model = getattr(model, "_orig_mod", model)
    if is_peft(model):
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            raise ValueError(
                "prompt-learning adapters (prefix, prompt or p-tuning) are not supported, only LoRA-like ones."
            )
        model = model.get_base_model()
    return getattr(model, "_orig_mod", model)


def backbone(model: Any) -> Any:
    """The decoder of a causal language model, without its head: what gives the last hidden state.

    `base_model`, or, where a class names that wrongly (Llama4ForCausalLM), the child that holds the input embedding.

    Raises:
        ValueError: a model that cannot be run without its head, or a prompt-learning adapter (its virtual tokens would
            be left out silently).
    """
    causal = causal_model(model)
    decoder = getattr(causal, "base_model", causal)
    if decoder is not causal:
        return decoder
    embedding = input_embedding(causal)
    if embedding is not None:
        for child in causal.children():
            if child is not embedding and any(module is embedding for module in child.modules()):
                return child
    raise ValueError(f"{type(causal).__name__} has no backbone apart from its head (`base_model`).")


def input_embedding(causal: Any) -> Any:
    """The module that embeds token ids, or None if the model does not tell."""
    try:
        return causal.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def text_config(model: Any) -> Any:
    """The part of a model's configuration that describes its language model."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


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


def head_module(model: Any) -> nn.Module:
    """The output head: one linear layer.

    Raises:
        ValueError: no output embeddings, one without a weight of its own, or an adapter on it.
    """
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    head = get_output_embeddings() if callable(get_output_embeddings) else None
    if head is None:
        raise ValueError(
            f"LMHead.from_model needs a model with output embeddings, got {type(model).__name__}; "
            "build LMHead(weight, bias, ...) yourself"
        )
    if hasattr(head, "base_layer"):
        raise ValueError(
            "the model has a PEFT adapter on its output head: reading `lm_head.weight` would silently ignore the "
            "adapter. Remove 'lm_head' from target_modules (or merge the adapter first)"
        )
    if not isinstance(getattr(head, "weight", None), torch.Tensor):
        raise ValueError(
            f"the output head of {type(model).__name__} is a {type(head).__name__} without a `weight`, not one linear "
            "layer; if it is linear all the same, build LMHead(weight, bias, ...) yourself"
        )
    return head


def head_tensors(model: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of the output head; a DTensor is gathered.

    Raises:
        ValueError: as `head_module`; a head that is partitioned (ZeRO-3) or on the meta device.
    """
    head: Any = head_module(model)
    weight, bias = head.weight, getattr(head, "bias", None)
    if is_dtensor(weight):
        weight = weight.full_tensor()
        bias = bias.full_tensor() if bias is not None else None
    if weight.numel() == 0 and hasattr(weight, "ds_id"):
        raise ValueError(
            "the head is partitioned by DeepSpeed ZeRO-3: build the LMHead inside "
            "`deepspeed.zero.GatheredParameters([lm_head.weight])`"
        )
    if weight.device.type == "meta":
        raise ValueError("the head is on the meta device (offloaded or not loaded): load its weights first")
    return weight, bias


def is_sharded(model: Any) -> bool:
    """Whether a parameter lies in pieces on several processes (FSDP, ZeRO-3, tensor parallelism)."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return any(is_dtensor(parameter) or hasattr(parameter, "ds_id") for parameter in parameters) or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in _modules(model)
    )


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether the tensor is sharded over a device mesh (a DTensor, by name: its module need not be importable)."""
    return type(tensor).__name__ == "DTensor"


def _modules(model: Any) -> Iterator[nn.Module]:
    return model.modules() if isinstance(model, nn.Module) else iter(())
