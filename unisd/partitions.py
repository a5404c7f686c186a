"""Weights in the parts of DeepSpeed's ZeRO-3: what of them lies here, and writing into it.

A weight of N numbers is cut flat, in ceil(N / processes) numbers each. `parameter.ds_tensor` is the part of this
process, padded at its end; the engine gathers from there, and keeps the gathered weight in `parameter.data` as long as
it sees use for it. So whoever writes into the part lets go of what is gathered first. Nothing here imports DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

# By model; neither keeps the other alive.
_ENGINES: WeakKeyDictionary[nn.Module, ref[Any]] = WeakKeyDictionary()


def is_partitioned(parameter: Any) -> bool:
    """Whether it is a parameter of ZeRO-3, whose weight lies in flat parts."""
    return hasattr(parameter, "ds_tensor")


def remember_engine(model: nn.Module, engine: Any) -> None:
    """Say which `deepspeed.DeepSpeedEngine` gathers the weights of a model, unwrapped."""
    _ENGINES[model] = ref(engine)


def has_parts(model: nn.Module) -> bool:
    """Whether the weights of a model lie in parts."""
    return any(is_partitioned(parameter) for parameter in model.parameters())


def part(parameter: Any) -> torch.Tensor:
    """[n] numbers of a weight that lie in this process, live, without padding: n = ceil(N / processes), or what is left
    of N for the last ones."""
    flat = parameter.ds_tensor.detach()
    left = int(parameter.ds_numel) - _rank(parameter) * flat.numel()
    return flat[: max(0, min(flat.numel(), left))]


def sharded(parameter: Any, values: torch.Tensor) -> DTensor:
    """[N] as a DTensor over the processes of a weight, of what each has for its `part`."""
    size = torch.Size((int(parameter.ds_numel),))
    return _of_rows(parameter, values, size)


def gathered(parameter: Any) -> torch.Tensor:
    """A copy of a whole small weight, in its shape, that leaves alone what the engine has gathered. All processes have
    to call it."""
    return sharded(parameter, part(parameter)).full_tensor().view(parameter.ds_shape)


def sharded_product(b: Any, a: Any) -> DTensor:
    """B A, float32 [out, in], of weights B [out, r] and A [r, in] in parts; each process makes its rows."""
    whole_b, whole_a = gathered(b).float(), gathered(a).float()
    size = torch.Size((whole_b.shape[0], whole_a.shape[1]))
    rows = -(-size[0] // _mesh(b).size())
    return _of_rows(b, whole_b[_rank(b) * rows :][:rows] @ whole_a, size)


@contextmanager
def parts_only(model: nn.Module) -> Iterator[None]:
    """Context that writes into parts, on all processes: nothing is gathered meanwhile, and afterwards what the engine
    keeps gathered (small weights, those of modules that run) is gathered anew."""
    parameters: list[Any] = list(model.parameters())
    running = [(parameter, set(parameter.ds_active_sub_modules)) for parameter in parameters]
    engine = _ENGINES.get(model, lambda: None)()
    kept = [parameter for parameter, modules in running if modules or (engine and parameter.ds_persist)]
    if engine is not None:
        engine.empty_partition_cache()  # waits for what is on its way
    yield
    if kept:
        kept[0].all_gather(param_list=kept)
    for parameter, modules in running:
        parameter.ds_active_sub_modules.update(modules)


def check_engine(config: Mapping[str, Any], what: str) -> None:
    """Raise ValueError for an engine that does not gather from the parts on its accelerators.

    Args:
        config: of DeepSpeed.
        what: the setting whose teacher has weights of its own.
    """
    zero = config.get("zero_optimization") or {}
    offloaded = (zero.get("offload_param") or {}).get("device") or "none"
    settings = {
        "offload_param": offloaded != "none",
        "zero_hpz_partition_size": (zero.get("zero_hpz_partition_size") or 1) > 1,
        "mics_shard_size": (zero.get("mics_shard_size") or -1) > 0,
        "zero_quantized_nontrainable_weights": bool(zero.get("zero_quantized_nontrainable_weights")),
    }
    for name, is_set in settings.items():
        if is_set:
            raise ValueError(
                f"{what} has weights of its own, which ZeRO-3 cannot hold with {name}: leave {name} out of DeepSpeed's "
                "config, or use FSDP2 (unisd launch fsdp2)"
            )


def _of_rows(parameter: Any, rows: torch.Tensor, size: torch.Size) -> DTensor:
    stride = (size[1], 1) if len(size) == 2 else (1,)
    return DTensor.from_local(rows, _mesh(parameter), [Shard(0)], run_check=False, shape=size, stride=stride)


def _mesh(parameter: Any) -> DeviceMesh:
    return DeviceMesh.from_group(parameter.ds_process_group, parameter.ds_tensor.device.type)


def _rank(parameter: Any) -> int:
    return torch.distributed.get_rank(parameter.ds_process_group)
