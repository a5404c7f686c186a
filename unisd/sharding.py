"""Weights that lie in shards on several processes (FSDP2): what is here of them, and when it may be written.

FSDP2 keeps a weight as a DTensor and puts the gathered one in its place while modules run. It gathers from the shards,
so whoever writes into them in place, while nothing is gathered, changes the weight of every process' next pass. Nothing
here gathers a model. Of ZeRO-3, whose parts are no DTensors, only what it has is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_partitioned(parameter: Any) -> bool:
    """Whether it is a parameter of ZeRO-3, whose weight lies in flat parts."""
    return hasattr(parameter, "ds_tensor")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a weight or an average, live: the shard of a DTensor, all of any other."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copy_of(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy in `dtype`; of a shard a DTensor of the same placement, which `torch.distributed.checkpoint` saves, and
    loads onto another number of processes."""
    return parameter.detach().to(dtype, copy=True)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the weights of a model, which it does when training begins."""
    return isinstance(_bare(model), FSDPModule)


def reshard(model: nn.Module) -> None:
    """Let go of all gathered weights, so that the model's parameters are the shards; nothing for whole weights."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # `FSDPModule.reshard` leaves what is to stay gathered until the backward pass (root, last norm and head).
            for group in module._get_fsdp_state()._fsdp_param_groups:
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


def _bare(model: Any) -> nn.Module:
    return getattr(model, "_orig_mod", model)
