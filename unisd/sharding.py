"""Weights that lie in shards on several processes (FSDP2, ZeRO-3): what is here of them, and when it may be written.

FSDP2 keeps a weight as a DTensor and puts the gathered one in its place while modules run. It gathers from the shards,
so whoever writes into them in place, while nothing is gathered, changes the weight of every process' next pass. Nothing
here gathers a model. The same of ZeRO-3, whose parts are no DTensors, is in `unisd.partitions`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from unisd.partitions import has_parts, is_partitioned, part, parts_only, sharded


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a weight or an average, live and detached: the shard of a DTensor, the flat part of a
    weight of ZeRO-3, all of any other."""
    if is_partitioned(tensor):
        return part(tensor)
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copy_of(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy in `dtype`; of a shard a DTensor of the same placement (of a weight of ZeRO-3 a flat one), which
    `torch.distributed.checkpoint` saves, and loads onto another number of processes."""
    if is_partitioned(parameter):
        return sharded(parameter, part(parameter).to(dtype, copy=True))
    return parameter.detach().to(dtype, copy=True)


def shape_of(parameter: Any) -> tuple[int, ...]:
    """Shape of a whole weight, also while it lies in parts."""
    return tuple(parameter.ds_shape if is_partitioned(parameter) else parameter.shape)


def numel_of(tensor: Any) -> int:
    """Numbers of a whole weight, also while it lies in parts."""
    return int(tensor.ds_numel) if is_partitioned(tensor) else tensor.numel()


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 has sharded the weights of a model, which they do when training begins, or earlier."""
    return isinstance(_bare(model), FSDPModule) or has_parts(model)


@contextmanager
def shards_only(model: nn.Module) -> Iterator[None]:
    """Context that writes into shards in place, on all processes: the model's parameters are the shards, and afterwards
    what is to be gathered is gathered anew. Within the forward pass of the root."""
    if has_parts(model):
        with parts_only(_bare(model)):
            yield
        return
    reshard(model)
    yield
    gather_root(model)


def reshard(model: nn.Module) -> None:
    """Let go of all gathered weights, so that the model's parameters are the shards; nothing for whole weights."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # `FSDPModule.reshard` leaves what is to stay gathered until the backward pass (root, last norm and head).
            for group in _groups(module):
                group._to_sharded()


def gather_root(model: nn.Module) -> None:
    """Gather again what `reshard` let go of and no submodule gathers for itself: the root's own weights, which FSDP2
    gathers when its forward pass begins. To be called within that."""
    root = _bare(model)
    if isinstance(root, FSDPModule):
        root.unshard()


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """PEFT's `disable_adapter`, also within the forward pass of a sharded model. It sets `requires_grad` of what the
    modules hold, so they have to hold the shards when it is turned on and off."""
    reshard(model)
    with model.disable_adapter():
        gather_root(model)
        try:
            yield
        finally:
            reshard(model)
    gather_root(model)


def gather_head(head: Any) -> None:
    """Gather the weights of an output head whose forward pass is never called. A head that FSDP2 manages is a plain
    weight afterwards, whose gradient FSDP2 reduces; one sharded by tensor parallelism stays as it is."""
    if isinstance(head, FSDPModule):
        head.unshard()


def _groups(module: FSDPModule) -> list[Any]:
    """Groups of weights that are gathered together; older versions of torch have at most one for a module."""
    state: Any = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _bare(model: Any) -> nn.Module:
    return getattr(model, "_orig_mod", model)
