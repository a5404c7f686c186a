"""A peer's step: a function that runs a case's operation once on any inputs of that case."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from unisd_kernels.config import LossInputs


class Outcome(NamedTuple):
    """`value`: the loss of "unisd_loss", D [N] of "divergence" (a scalar where the peer has no more), the
    log-probabilities [N] of "scoring". `gradient`: [N, H], of the student's hidden states, where the operation has one.
    Both None for the floor."""

    value: torch.Tensor | None
    gradient: torch.Tensor | None


Step = Callable[[LossInputs], Outcome]


def scoring(losses: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> Step:
    """The step of a scorer that goes from hidden states, weight and ids to negative log-probabilities [N]."""

    def step(inputs: LossInputs) -> Outcome:
        hidden, weight = inputs.student_hidden.detach(), inputs.student_head.weight.detach()
        with torch.no_grad():
            return Outcome(-losses(hidden, weight, inputs.target_ids).float(), None)

    return step


def leaves(inputs: LossInputs) -> tuple[torch.Tensor, ...]:
    """Tensors that a backward differentiates: student's hidden states [N, H], then a trainable head's weight [V, H]."""
    weight = inputs.student_head.weight
    return (inputs.student_hidden, weight) if weight.requires_grad else (inputs.student_hidden,)


def differentiate(loss: torch.Tensor, inputs: LossInputs) -> torch.Tensor:
    """The gradient of the student's hidden states; that of a trainable head is computed too."""
    return torch.autograd.grad(loss, leaves(inputs))[0]


def weighted_backward(divergence: torch.Tensor, inputs: LossInputs) -> Outcome:
    """The backward of `sum_n u_n D_n`, D [N], u the token weights."""
    assert inputs.token_weights is not None
    gradients = torch.autograd.grad(divergence, leaves(inputs), inputs.token_weights.to(divergence.dtype))
    return Outcome(divergence.detach(), gradients[0])
