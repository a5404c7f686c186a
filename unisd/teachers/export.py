"""The moving average of a checkpoint, put into a model for good."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from unisd.modules import is_peft
from unisd.teachers.base import named_parameters, trained_parameters
from unisd.teachers.checkpoint import STATE_FILE, Average, SavedAverage
from unisd.teachers.lora import lora_layers

_DELTA = ".delta"


def read_average(folder: str | os.PathLike[str]) -> Average:
    """The description of the average in a checkpoint folder.

    Raises:
        ValueError: the checkpoint has none.
    """
    return _saved(folder).about


def _saved(folder: str | os.PathLike[str]) -> SavedAverage:
    saved = SavedAverage.in_folder(folder)
    if saved is None:
        raise ValueError(
            f"{folder} holds no moving-average teacher ({STATE_FILE}): the run had ema='none', so that its teacher was "
            "the model itself, or the weights before training"
        )
    return saved


@torch.no_grad()
def put_average(model: Any, folder: str | os.PathLike[str]) -> Any:
    """Give a model the weights of the average in a checkpoint, rounded to its own dtype.

    Args:
        model: the student of the checkpoint, with its adapter where it has one; changed in place.

    Returns:
        The model. For the mode "merged", whose average no adapter can hold, that is its base with the average added to
        the weights.

    Raises:
        ValueError: no average, or one of another model.
    """
    saved = _saved(folder)
    average, names = saved.about, saved.tensors.keys()
    if (average.mode != "full") != is_peft(model):
        raise ValueError(
            f"{folder} holds the average of ema={average.mode!r}, which does not fit a model "
            f"{'with' if is_peft(model) else 'without'} an adapter"
        )
    layers = lora_layers(model) if average.mode == "merged" else {}
    deltas = {f"{name}{_DELTA}": layer for name, layer in layers.items()}
    parameters = trained_parameters(model) if average.mode == "adapter" else named_parameters(model)
    # Frozen weights are those of the checkpoint; with LoRA every trained one has an average.
    known = names & parameters.keys() if average.mode == "full" else {*deltas, *(names & parameters.keys())}
    missing = parameters.keys() - names if average.mode == "adapter" else deltas.keys() - names
    _check_names([*(names - known), *missing], folder)
    for name, tensor in saved.each():
        if name in deltas:
            weight = deltas[name].get_base_layer().weight
            _check_shape(name, tensor, weight)
            weight.copy_(weight.float() + tensor.to(weight.device))
        else:
            _check_shape(name, tensor, parameters[name])
            parameters[name].copy_(tensor)
    if average.mode != "merged":
        return model
    for layer in layers.values():  # what they add is in the weights
        for part in layer.lora_B.values():
            part.weight.zero_()
    return model.merge_and_unload()


def _check_names(differing: Iterable[str], folder: str | os.PathLike[str]) -> None:
    names = sorted(differing)
    if names:
        raise ValueError(
            f"the average in {folder} belongs to another model or adapter: {len(names)} names differ, the first is "
            f"{names[0]!r}"
        )


def _check_shape(name: str, tensor: torch.Tensor, weight: nn.Parameter) -> None:
    if tensor.shape != weight.shape:
        raise ValueError(f"{name!r} of the average is {tuple(tensor.shape)}, expected {tuple(weight.shape)}")
