"""Shared by the autograd functions: a backward that refuses to be differentiated, and inference tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch

from unisd_kernels.config import LossInputs
from unisd_kernels.heads import LMHead

_R = TypeVar("_R")


def first_order_only(backward: Callable[..., _R]) -> Callable[..., _R]:
    """A backward that raises where a graph of it is asked for.

    Its operations would not be in that graph: what comes out would count as a constant, and a gradient penalty would
    vanish without a word. (`once_differentiable` lets it pass where the upstream gradient requires none.)
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *upstream: Any) -> _R:
        # autograd sets this to `create_graph`.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "double backward is not supported by the fused operations of unisd_kernels, and create_graph=True asks "
                "for it: leave it out, or take impl='reference' (dense) for the term whose gradient is differentiated"
            )
        return backward(ctx, *upstream)

    return wrapped


def save(ctx: Any, *tensors: torch.Tensor | None) -> None:
    """`ctx.save_for_backward`, also for tensors made under `torch.inference_mode()`, which that refuses. They have no
    version to be checked at the backward, so they are kept as they are."""
    ctx.inference_tensors = [tensor if tensor is not None and tensor.is_inference() else None for tensor in tensors]
    ctx.save_for_backward(
        *(tensor if kept is None else None for tensor, kept in zip(tensors, ctx.inference_tensors, strict=True))
    )


def saved(ctx: Any) -> list[Any]:
    """Tensors that `save` was given."""
    return [
        tensor if kept is None else kept for tensor, kept in zip(ctx.saved_tensors, ctx.inference_tensors, strict=True)
    ]


def recordable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy if autograd would refuse to save it; for the dense reference, whose operations save all."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


def recordable_head(head: LMHead) -> LMHead:
    """The head with `recordable` tensors."""
    bias = None if head.bias is None else recordable(head.bias)
    return replace(head, weight=recordable(head.weight), bias=bias)


def recordable_inputs(inputs: LossInputs) -> LossInputs:
    """The inputs with `recordable` tensors."""

    def take(value: Any) -> Any:
        if isinstance(value, LMHead):
            return recordable_head(value)
        if isinstance(value, tuple):
            return tuple(map(take, value))
        return recordable(value) if isinstance(value, torch.Tensor) else value

    return LossInputs(**{name: take(value) for name, value in inputs.arguments().items()})
