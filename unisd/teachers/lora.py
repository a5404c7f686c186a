"""Moving averages of a LoRA adapter: of its two factors, or of their product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from unisd.modules import head_is_trained, is_peft, model_head
from unisd.teachers.base import EMATeacher, named_parameters, trained_parameters
from unisd_kernels import LMHead, ema_update_


class AdapterEMATeacher(EMATeacher):
    """LoRA: every trained tensor (A, B and what else is trained) averaged on its own and swapped in for scoring."""

    mode = "adapter"

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(decay)
        _require_peft(model, self.mode)
        self._averages = {name: _wide(parameter) for name, parameter in trained_parameters(model).items()}

    def follow(self, model: nn.Module) -> None:
        _move(self._averages, named_parameters(model))

    @contextmanager
    def _weights(self, model: nn.Module) -> Iterator[nn.Module]:
        with _swapped(model, self._averages):
            yield model

    def head(self, model: nn.Module) -> LMHead | None:
        return model_head(model).detach() if head_is_trained(model) else None

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._averages

    def _update(self, model: nn.Module) -> None:
        student = named_parameters(model)
        ema_update_(self._averages.values(), [student[name] for name in self._averages], self.decay)


class MergedEMATeacher(EMATeacher):
    """LoRA: the exact average of what the adapter adds to each weight, `mean(scaling B A)`, kept dense.

    The average of products of rank r has a growing rank, so it cannot be held as another A and B. While scoring, B is
    zero, which silences the adapter exactly, and a forward hook on each adapted layer adds `x mean(scaling B A)^T`.
    Trained tensors outside of LoRA layers are averaged and swapped in as in `AdapterEMATeacher`.
    """

    mode = "merged"

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(decay)
        _require_peft(model, self.mode)
        layers = lora_layers(model)
        self._deltas = {name: _product(layer) for name, layer in layers.items()}
        adapter = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
        self._others = {
            name: _wide(parameter)
            for name, parameter in trained_parameters(model).items()
            if id(parameter) not in adapter
        }

    def follow(self, model: nn.Module) -> None:
        layers = lora_layers(model)
        _move(self._deltas, {name: layer.lora_B[_adapters(layer)[0]].weight for name, layer in layers.items()})
        _move(self._others, named_parameters(model))

    @contextmanager
    def _weights(self, model: nn.Module) -> Iterator[nn.Module]:
        layers = lora_layers(model)
        silenced = {
            f"{name}.lora_B.{adapter}.weight": torch.zeros_like(layer.lora_B[adapter].weight)
            for name, layer in layers.items()
            for adapter in _adapters(layer)
        }
        with ExitStack() as stack:
            stack.enter_context(_swapped(model, {**self._others, **silenced}))
            for name, layer in layers.items():
                handle = layer.register_forward_hook(_adding(self._deltas[name]))
                stack.callback(handle.remove)
            yield model

    def head(self, model: nn.Module) -> LMHead | None:
        return model_head(model).detach() if head_is_trained(model) else None

    def tensors(self) -> dict[str, torch.Tensor]:
        return {**{f"{name}.delta": delta for name, delta in self._deltas.items()}, **self._others}

    def _update(self, model: nn.Module) -> None:
        layers = lora_layers(model)
        for name, delta in self._deltas.items():  # one dense product at a time
            ema_update_([delta], [_product(layers[name])], self.decay)
        student = named_parameters(model)
        ema_update_(self._others.values(), [student[name] for name in self._others], self.decay)


def _require_peft(model: nn.Module, mode: str) -> None:
    if not is_peft(model):
        raise ValueError(f"ema={mode!r} averages a PEFT adapter, but the model has none; use ema='full'")


def _wide(parameter: torch.Tensor) -> torch.Tensor:
    """A float32 (float64 for float64) copy."""
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return parameter.detach().to(dtype, copy=True)


def _move(averages: dict[str, torch.Tensor], like: dict[str, Any]) -> None:
    """Move each average to the device of the tensor of its name, in its own dtype."""
    for name, average in averages.items():
        if average.device != like[name].device:
            averages[name] = average.to(like[name].device)


@contextmanager
def _swapped(model: nn.Module, values: dict[str, torch.Tensor]) -> Iterator[None]:
    """Let the named parameters hold `values` (in their own dtype), then give them their own storage back."""
    parameters = named_parameters(model)
    originals = {name: parameters[name].data for name in values}
    try:
        for name, value in values.items():
            parameters[name].data = value.to(originals[name].dtype)
        yield
    finally:
        for name, original in originals.items():
            parameters[name].data = original


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
    """Addition of the active adapters of a LoRA layer to its weight: sum of scaling B A, float32 [out, in]."""
    delta = None
    for adapter in _adapters(layer):
        b, a = layer.lora_B[adapter].weight.detach(), layer.lora_A[adapter].weight.detach()
        product = (b.float() @ a.float()) * layer.scaling[adapter]
        delta = product if delta is None else delta + product
    if delta is None:
        raise ValueError("a LoRA layer has no active adapter; activate one with model.set_adapter(name)")
    return delta


def _adding(delta: torch.Tensor) -> Any:
    """Forward hook that adds `x delta^T`, `delta` [out, in], to a layer's output."""

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = args[0]
        return output + functional.linear(x, delta.to(x.dtype)).to(output.dtype)

    return hook
