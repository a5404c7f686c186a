"""This package."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.cases import Inputs
from unisd_kernels import unisd_loss


def build(inputs: Inputs, beta: float) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    def step() -> tuple[torch.Tensor, torch.Tensor]:
        result = unisd_loss(
            inputs.student_hidden,
            inputs.head,
            inputs.teacher_hidden,
            inputs.head.detach(),
            inputs.target_ids,
            inputs.cu_seqlens,
            auxiliary_hidden=inputs.auxiliary_hidden,
            negative_hidden=inputs.negative_hidden,
            beta=beta,
            **inputs.case.options,
        )
        (gradient,) = torch.autograd.grad(result.loss, inputs.student_hidden)
        return result.loss.detach(), gradient

    return step
