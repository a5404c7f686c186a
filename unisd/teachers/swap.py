"""A model under other weights, meanwhile: put in the place of its own, whole or shard by shard; an average of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from unisd.head import gathered_head
from unisd.modules import head_is_trained, model_head
from unisd.sharding import is_sharded, local, reshard, shards_only
from unisd.teachers.base import EMATeacher, flat_shapes, move, named_parameters, trained_parameters, wide
from unisd_kernels import LMHead


@contextmanager
def swapped(model: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let the named parameters hold `values` (in their own dtype), then their own weights again, bit for bit.

    Whole weights change their storage. Shards are written in place, since the engine gathers from where they are: that
    keeps one more copy of the named shards meanwhile, and has to be within the forward pass of the root.
    """
    if is_sharded(model):
        with _swapped_shards(model, values):
            yield
        return
    parameters = named_parameters(model)
    originals = {name: parameters[name].data for name in values}
    try:
        for name, value in values.items():
            parameters[name].data = value.to(originals[name].dtype)
        yield
    finally:
        for name, original in originals.items():
            parameters[name].data = original


@contextmanager
def _swapped_shards(model: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    parts: dict[str, torch.Tensor] = {}
    originals: dict[str, torch.Tensor] = {}
    try:
        with shards_only(model):
            parameters = named_parameters(model)  # now, while they are the shards
            parts = {name: local(parameters[name]) for name in values}
            originals = {name: part.clone() for name, part in parts.items()}
            _write(parts, values)
        yield
    finally:
        with shards_only(model):
            _write(parts, originals)


def _write(parts: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        parts[name].copy_(local(value))


def swapped_head(model: nn.Module) -> LMHead | None:
    """The head under the weights that are in place now, frozen; it keeps them when the student's are back. None where
    it is the student's own, which is not trained."""
    if not head_is_trained(model):
        return None
    with gathered_head(model):
        head = model_head(model).detach()
        if not is_sharded(model):
            return head  # another storage than the student's
        bias = None if head.bias is None else head.bias.clone()
        return replace(head, weight=head.weight.clone(), bias=bias)


class SwappedEMATeacher(EMATeacher):
    """Every trained tensor averaged on its own, and put in the place of the student's for scoring."""

    def __init__(self, model: nn.Module, decay: float, *, start: bool = True) -> None:
        super().__init__(decay)
        self._averages: dict[str, torch.Tensor] = {}
        if start:
            self.start(model)

    def start(self, model: nn.Module) -> None:
        reshard(model)
        trained = trained_parameters(model)
        self._averages = {name: wide(parameter) for name, parameter in trained.items()}
        self.shapes = flat_shapes(trained)

    def follow(self, model: nn.Module) -> None:
        move(self._averages, named_parameters(model))

    @contextmanager
    def _weights(self, model: nn.Module) -> Iterator[nn.Module]:
        with swapped(model, self._averages):
            yield model

    def head(self, model: nn.Module) -> LMHead | None:
        return swapped_head(model)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._averages

    def _update(self, model: nn.Module) -> None:
        self._average(self._averages, named_parameters(model))
