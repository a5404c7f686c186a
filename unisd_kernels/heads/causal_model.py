"""Base, backbone, head and mode of a Hugging Face causal language model, without importing transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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


class HeadParts(NamedTuple):
    """Tensors of an output head, by their names in `LMHead`; the last two of a slice of a vocabulary."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    vocab_start: int | None = None
    group: ProcessGroup | None = None


def head_parts(model: Any) -> HeadParts:
    """Weight and bias of the output head as an `LMHead` takes them.

    Of a weight that tensor parallelism has cut by rows (a DTensor with `Shard(0)`) this rank's slice, as it lies, and
    through which gradients reach the DTensor; what the mesh's other dimensions share out is gathered over these. Every
    other DTensor, as FSDP makes them, is gathered: its ranks have other tokens.

    Raises:
        ValueError: as `head_module`; a head that is partitioned (ZeRO-3) or on the meta device.
    """
    head: Any = head_module(model)
    weight, bias = head.weight, getattr(head, "bias", None)
    if is_dtensor(weight):
        dimension = _vocabulary_dimension(model, weight)
        if dimension is not None:
            return _slice_of(weight, bias, dimension)
        weight = weight.full_tensor()
        bias = bias.full_tensor() if bias is not None else None
    if weight.numel() == 0 and hasattr(weight, "ds_id"):
        raise ValueError(
            "the head is partitioned by DeepSpeed ZeRO-3: build the LMHead inside "
            "`deepspeed.zero.GatheredParameters([lm_head.weight])`"
        )
    if weight.device.type == "meta":
        raise ValueError("the head is on the meta device (offloaded or not loaded): load its weights first")
    return HeadParts(weight, bias)


def _vocabulary_dimension(model: Any, weight: Any) -> int | None:
    """Which dimension of a DTensor's mesh is of ranks that have the same tokens and slices of the weight's rows: that
    of tensor parallelism, which transformers calls "tp". In a mesh without such a name the one that has `Shard(0)`, but
    not where modules say that FSDP has sharded them. None: there is no such dimension."""
    shards = [place for place, placement in enumerate(weight.placements) if _cuts_rows(placement)]
    names = weight.device_mesh.mesh_dim_names or ()
    if "tp" in names:
        return names.index("tp") if names.index("tp") in shards else None
    if len(shards) != 1 or any(not placement.is_replicate() for placement in _others(weight.placements, shards[0])):
        return None
    kinds = {kind.__name__ for module in _modules(model) for kind in type(module).__mro__}
    return None if kinds & {"FSDPModule", "FullyShardedDataParallel"} else shards[0]


def _cuts_rows(placement: Any) -> bool:
    return type(placement).__name__ == "Shard" and placement.dim == 0


def _others(placements: Any, dimension: int) -> list[Any]:
    return [placement for place, placement in enumerate(placements) if place != dimension]


def _slice_of(weight: Any, bias: Any, dimension: int) -> HeadParts:
    """This rank's part of a DTensor with `Shard(0)` in a dimension of its mesh, and of the bias, which may also be
    whole on every rank. Over the other dimensions it is gathered, if it is in parts there."""
    mesh, rows = weight.device_mesh, weight.shape[0]
    # As DTensor cuts: ceil(rows / ranks) each, less or nothing at the end.
    start = min(mesh.get_local_rank(dimension) * -(-rows // mesh.size(dimension)), rows)
    # Also under no_grad, where the slice of a trainable weight would pass for a frozen one.
    with torch.enable_grad():
        local = _gathered_but_in(weight, dimension).to_local()
        if bias is not None and is_dtensor(bias):
            same = bias.device_mesh == mesh and _cuts_rows(bias.placements[dimension])
            bias = (
                _gathered_but_in(bias, dimension).to_local()
                if same
                else bias.full_tensor()[start : start + local.shape[0]]
            )
        elif bias is not None:
            bias = bias[start : start + local.shape[0]]
    return HeadParts(local, bias, start, mesh.get_group(dimension))


def _gathered_but_in(tensor: Any, dimension: int) -> Any:
    """The DTensor, whole over every dimension of its mesh but one."""
    if all(placement.is_replicate() for placement in _others(tensor.placements, dimension)):
        return tensor
    from torch.distributed.tensor import Replicate

    placements = [Replicate()] * tensor.device_mesh.ndim
    placements[dimension] = tensor.placements[dimension]
    return tensor.redistribute(placements=placements)


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
