"""Weights that lie in pieces on several processes (FSDP2, ZeRO-3): what is here of them, and when it may be written.

FSDP2 keeps a weight as a DTensor and puts the gathered one in its place while modules run; ZeRO-3 keeps a flat part of
it (`ds_tensor`) beside an empty parameter. Both gather from those parts, so whoever writes into them in place, while
nothing is gathered, changes the weight of every process' next pass. Nothing here gathers a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard


def is_partitioned(parameter: Any) -> bool:
    """Whether it is a parameter of ZeRO-3, whose weight lies in flat parts."""
    return hasattr(parameter, "ds_tensor")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a weight or an average, live: the shard of a DTensor, the flat part of ZeRO-3's
    without its padding, all of any other."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    if is_partitioned(tensor):
        part: Any = tensor
        held = part.ds_tensor.detach().view(-1)
        begin = distributed.get_rank(part.ds_process_group) * held.numel()
        return held[: max(0, min(held.numel(), part.ds_numel - begin))]
    return tensor


def copy_of(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy in `dtype`, in pieces like the weight: a DTensor like FSDP2's, one of the flat weight under ZeRO-3.
    Both are what `torch.distributed.checkpoint` saves, and loads onto another number of processes."""
    if not is_partitioned(parameter):
        return parameter.detach().to(dtype, copy=True)
    part: Any = parameter
    mesh = init_device_mesh(part.ds_tensor.device.type, (distributed.get_world_size(part.ds_process_group),))
    held = local(parameter).to(dtype, copy=True)
    size = torch.Size((part.ds_numel,))
    return DTensor.from_local(held, mesh, [Shard(0)], run_check=False, shape=size, stride=(1,))


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights of a model lie in pieces by now (FSDP2 shards when training begins)."""
    return isinstance(_bare(model), FSDPModule) or any(is_partitioned(parameter) for parameter in model.parameters())


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
