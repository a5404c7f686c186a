"""Teachers that are a copy of the model: frozen before training, or a moving average."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from unisd.modules import head_is_trained, is_peft, model_head
from unisd.sharding import adapter_off
from unisd.teachers.base import EMATeacher, Teacher, marks, named_parameters, trained_parameters
from unisd_kernels import LMHead


class BaseTeacher(Teacher):
    """The weights before training: with LoRA the adapter switched off, else a frozen copy of the model.

    The copy is taken from the model the trainer is built with, also on resume: build it with the original model.
    """

    mode = "base"

    def __init__(self, model: nn.Module) -> None:
        self._copy = None if is_peft(model) else _frozen_copy(model)
        # Asked now: while the adapter is off, nothing is trained.
        self._head_is_trained = head_is_trained(model)

    def version(self, model: nn.Module) -> Hashable:
        scoring = model if self._copy is None else self._copy
        return tuple(marks(parameter for parameter in scoring.parameters() if not parameter.requires_grad))

    def follow(self, model: nn.Module) -> None:
        if self._copy is not None:
            _match(self._copy, model)

    @contextmanager
    def _weights(self, model: nn.Module) -> Iterator[nn.Module]:
        if self._copy is not None:
            yield self._copy
        else:
            with adapter_off(model):
                yield model

    def head(self, model: nn.Module) -> LMHead | None:
        if self._copy is not None:
            return model_head(self._copy).detach()
        # `modules_to_save` keeps a trained copy of the head beside the original one.
        return model_head(model).detach() if self._head_is_trained else None


class FullEMATeacher(EMATeacher):
    """Full fine-tuning: a copy of the model whose trained weights are averages. Frozen weights are shared with the
    student. For a 16-bit student the copy runs in 16 bits and is rounded from a float32 average at each update."""

    mode = "full"

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(decay)
        refuse_peft(model)
        names = list(trained_parameters(model))
        self._copy = _frozen_copy(model)
        parameters = named_parameters(self._copy)
        self._parameters = {name: parameters[name] for name in names}
        # A float32 copy is its own average; a 16-bit one is rounded from a wider one.
        self._averages = {
            name: parameter.data if parameter.dtype in (torch.float32, torch.float64) else parameter.data.float()
            for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        if not _match(self._copy, model):
            return
        parameters = named_parameters(self._copy)
        self._parameters = {name: parameters[name] for name in self._parameters}
        for name, parameter in self._parameters.items():
            average = self._averages[name].to(parameter.device)
            # A weight as wide as its average holds it. After a cast from 16 bits that is the average, not its rounding.
            if parameter.dtype == average.dtype:
                parameter.data = average
            self._averages[name] = average
        self._after_load()

    @contextmanager
    def _weights(self, model: nn.Module) -> Iterator[nn.Module]:
        yield self._copy

    def head(self, model: nn.Module) -> LMHead | None:
        return model_head(self._copy).detach()

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._averages

    @torch.no_grad()
    def _update(self, model: nn.Module) -> None:
        self._average(self._averages, named_parameters(model))
        self._after_load()

    @torch.no_grad()
    def _after_load(self) -> None:
        for name, average in self._averages.items():
            if self._parameters[name].dtype != average.dtype:
                self._parameters[name].copy_(average)


def refuse_peft(model: nn.Module) -> None:
    """Raise ValueError for a PEFT model, which ema="full" is not for."""
    if is_peft(model):
        raise ValueError(
            "ema='full' averages the trained weights of a whole model, but this is a PEFT model, whose base never "
            "moves; use ema='adapter' or ema='merged'"
        )


@torch.no_grad()
def _match(copied: nn.Module, model: nn.Module) -> bool:
    """Bring the parameters and buffers of a copy to the devices and dtypes of the model's.

    Returns:
        Whether any was elsewhere.
    """
    model, copied = getattr(model, "_orig_mod", model), getattr(copied, "_orig_mod", copied)
    sources = dict(model.named_modules())
    moved: dict[int, nn.Parameter] = {}  # a tied weight is moved once, and stays tied
    changed = False
    for name, module in copied.named_modules():
        source = sources[name]
        for tensors, like in ((module._parameters, source._parameters), (module._buffers, source._buffers)):
            for key, tensor in tensors.items():
                other = like.get(key)
                if tensor is None or other is None or (tensor.device, tensor.dtype) == (other.device, other.dtype):
                    continue
                changed = True
                if isinstance(tensor, nn.Parameter):
                    if id(tensor) not in moved:
                        moved[id(tensor)] = nn.Parameter(tensor.detach().to(other), requires_grad=False)
                    tensors[key] = moved[id(tensor)]
                else:
                    tensors[key] = tensor.to(other)
    return changed


def _frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the model in eval mode that shares the parameters which are not trained."""
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False).eval()
