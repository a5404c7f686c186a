"""Moving averages of a LoRA adapter: of its two factors, or of their product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from unisd.modules import is_peft
from unisd.partitions import is_partitioned, sharded_product
from unisd.sharding import local, reshard
from unisd.teachers.base import EMATeacher, flat_shapes, move, named_parameters, trained_parameters, wide
from unisd.teachers.swap import SwappedEMATeacher, swapped, swapped_head
from unisd_kernels import LMHead


class AdapterEMATeacher(SwappedEMATeacher):
    """LoRA: every trained tensor (A, B and what else is trained) averaged on its own and swapped in for scoring."""

    mode = "adapter"

    def __init__(self, model: nn.Module, decay: float, *, start: bool = True) -> None:
        _require_peft(model, self.mode)
        super().__init__(model, decay, start=start)


class MergedEMATeacher(EMATeacher):
    """LoRA: the exact average of what the adapter adds to each weight, `mean(scaling B A)`, kept dense.

    The average of products of rank r has a growing rank, so it cannot be held as another A and B. While scoring, B is
    zero, which silences the adapter exactly, and a forward hook on each adapted layer adds `x mean(scaling B A)^T`.
    Trained tensors outside of LoRA layers are averaged and swapped in as in `AdapterEMATeacher`. Where B lies in shards
    of its rows the average lies in shards of the same rows; each is gathered when its layer runs.
    """

    mode = "merged"

    def __init__(self, model: nn.Module, decay: float, *, start: bool = True) -> None:
        super().__init__(decay)
        _require_peft(model, self.mode)
        lora_layers(model)
        self._deltas: dict[str, torch.Tensor] = {}
        self._others: dict[str, torch.Tensor] = {}
        if start:
            self.start(model)

    def start(self, model: nn.Module) -> None:
        reshard(model)
        layers = lora_layers(model)
        self._deltas = {name: _product(layer) for name, layer in layers.items()}
        adapter = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
        trained = trained_parameters(model)
        others = {name: parameter for name, parameter in trained.items() if id(parameter) not in adapter}
        self._others = {name: wide(parameter) for name, parameter in others.items()}
        self.shapes = flat_shapes(others)

    def follow(self, model: nn.Module) -> None:
        layers = lora_layers(model)
        move(self._deltas, {name: layer.lora_B[_adapters(layer)[0]].weight for name, layer in layers.items()})
        move(self._others, named_parameters(model))

    @contextmanager
    def _weights(self, model: nn.Module) -> Iterator[nn.Module]:
        layers = lora_layers(model)
        silenced = {
            f"{name}.lora_B.{adapter}.weight": torch.zeros_like(local(layer.lora_B[adapter].weight))
            for name, layer in layers.items()
            for adapter in _adapters(layer)
        }
        with ExitStack() as stack:
            stack.enter_context(swapped(model, {**self._others, **silenced}))
            for name, delta in self._deltas.items():  # none before `start`: the adapter adds nothing then
                handle = layers[name].register_forward_hook(_adding(delta))
                stack.callback(handle.remove)
            yield model

    def head(self, model: nn.Module) -> LMHead | None:
        return swapped_head(model)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {**{f"{name}.delta": delta for name, delta in self._deltas.items()}, **self._others}

    def _update(self, model: nn.Module) -> None:
        layers = lora_layers(model)
        for name, delta in self._deltas.items():  # one dense product at a time
            self._average({name: delta}, {name: _product(layers[name])})
        self._average(self._others, named_parameters(model))


def _require_peft(model: nn.Module, mode: str) -> None:
    if not is_peft(model):
        raise ValueError(f"ema={mode!r} averages a PEFT adapter, but the model has none; use ema='full'")


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The LoRA layers of a model by name.

    Raises:
        ValueError: an adapter whose contribution is not `scaling B A x` (DoRA and other variants, embeddings,
            convolutions, LoRA biases, other PEFT methods).
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        name = name.removeprefix("_orig_mod.")
        reason = None
        if not isinstance(module, LoraLayer):
            reason = f"it is a {type(module).__name__}"
        elif getattr(module, "lora_variant", None) or any(getattr(module, "use_dora", {}).values()):
            reason = "it uses a LoRA variant such as DoRA"
        elif any(not isinstance(part, nn.Linear) for part in module.lora_B.values()) or module.lora_embedding_A:
            reason = "it adapts an embedding or a convolution"
        elif any(part.bias is not None for part in module.lora_B.values()):
            reason = "it has a LoRA bias"
        if reason is not None:
            raise ValueError(
                f"ema='merged' needs plain LoRA on linear layers, but for {name!r} {reason}; use ema='adapter'"
            )
        layers[name] = module
    return layers


def _adapters(layer: Any) -> list[str]:
    return [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]


@torch.no_grad()
def _product(layer: Any) -> torch.Tensor:
    """Addition of the active adapters of a LoRA layer to its weight: sum of scaling B A, float32 [out, in]. Where B
    lies in shards of its rows, A [r, in] is gathered and each process makes its rows of the product; where it lies in
    flat parts both are gathered."""
    delta = None
    for adapter in _adapters(layer):
        product = _rows_of_product(layer.lora_B[adapter].weight, layer.lora_A[adapter].weight) * layer.scaling[adapter]
        delta = product if delta is None else delta + product
    if delta is None:
        raise ValueError("a LoRA layer has no active adapter; activate one with model.set_adapter(name)")
    return delta


def _rows_of_product(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """B A [out, in] of B [out, r] and A [r, in]; a DTensor where they are."""
    if is_partitioned(b):
        return sharded_product(b, a)
    b, a = b.detach().float(), a.detach().float()
    if not isinstance(b, DTensor):
        return b @ a
    assert isinstance(a, DTensor)
    size = torch.Size((b.shape[0], a.shape[1]))
    rows = b.to_local() @ a.full_tensor()
    return DTensor.from_local(rows, b.device_mesh, b.placements, run_check=False, shape=size, stride=(size[1], 1))


def _adding(delta: torch.Tensor) -> Any:
    """Forward hook that adds `x delta^T`, `delta` [out, in], to a layer's output."""

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = args[0]
        rounded = delta.to(x.dtype)
        dense = rounded.full_tensor() if isinstance(rounded, DTensor) else rounded
        return output + functional.linear(x, dense).to(output.dtype)

    return hook
