"""The dense formulas with float32 statistics, as a careful user would write them: each logits tensor made once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.cases import Inputs
from bench.peers.reduction import combine
from unisd_kernels.reference import divergence_from_log_probs


def build(inputs: Inputs, beta: float) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    weight = inputs.head.weight
    index = inputs.target_ids.unsqueeze(-1)
    temperature = inputs.case.options["temperature"]

    def log_probs(hidden: torch.Tensor, temperature: float) -> torch.Tensor:
        return torch.log_softmax((hidden @ weight.T).float() / temperature, dim=-1)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        student = log_probs(inputs.student_hidden, temperature)
        with torch.no_grad():
            teacher = log_probs(inputs.teacher_hidden, temperature)
            negative = log_probs(inputs.negative_hidden, temperature).gather(-1, index).squeeze(-1)
            auxiliary = torch.stack(
                [log_probs(hidden, 1.0).gather(-1, index).squeeze(-1) for hidden in inputs.auxiliary_hidden]
            )
        loss = combine(
            inputs,
            divergence_from_log_probs(student, teacher, beta),
            student.gather(-1, index).squeeze(-1),
            teacher.gather(-1, index).squeeze(-1),
            negative,
            auxiliary,
        )
        (gradient,) = torch.autograd.grad(loss, inputs.student_hidden)
        return loss.detach(), gradient

    return step
