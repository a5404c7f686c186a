"""What a contender makes for a case: a function that runs the operation once on any inputs of that case."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.inputs import Inputs


class Outcome(NamedTuple):
    """`value`: the loss of "unisd_loss", D [N] of "divergence" (a scalar where the contender has no more), the
    log-probabilities [N] of "scoring". `gradient`: of the student's hidden states, where the operation has one.
    Both None for the floor."""

    value: torch.Tensor | None
    gradient: torch.Tensor | None


Step = Callable[[Inputs], Outcome]


class NotOffered(Exception):
    """The contender does not have the operation, or not this divergence."""


class NotHere(Exception):
    """The contender does not run on this machine."""


def differentiate(loss: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """The gradient of the student's hidden states; that of a trainable head is computed too."""
    return torch.autograd.grad(loss, inputs.leaves)[0]


def weighted_backward(divergence: torch.Tensor, inputs: Inputs) -> Outcome:
    """The backward of `sum_n u_n D_n`."""
    gradients = torch.autograd.grad(divergence, inputs.leaves, inputs.upstream.to(divergence.dtype))
    return Outcome(divergence.detach(), gradients[0])
