"""The dense formulas with float32 statistics, as a careful user would write them: each logits tensor made once.

The functions of tensors stand alone, so that `compiled.py` can hand the same ones to torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from bench.cases import Inputs
from bench.peers.reduction import combine
from bench.peers.step import Outcome, Step, differentiate, weighted_backward
from unisd_kernels.reference import divergence_from_log_probs


def log_probs(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.log_softmax((hidden @ weight.T).float() / temperature, dim=-1)


def target_log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, temperature: float
) -> torch.Tensor:
    """`z_y - logsumexp(z)`, [N]; only the logits are held."""
    logits = (hidden @ weight.T).float() / temperature
    return logits.gather(-1, target_ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def divergence(
    student_hidden: torch.Tensor, teacher_hidden: torch.Tensor, weight: torch.Tensor, beta: float, temperature: float
) -> torch.Tensor:
    student = log_probs(student_hidden, weight, temperature)
    with torch.no_grad():
        teacher = log_probs(teacher_hidden, weight, temperature)
    return divergence_from_log_probs(student, teacher, beta)


class Statistics(NamedTuple):
    """Of each row, [N]; `auxiliary` [K, N]."""

    divergence: torch.Tensor
    student: torch.Tensor
    teacher: torch.Tensor
    negative: torch.Tensor
    auxiliary: torch.Tensor


def statistics(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    negative_hidden: torch.Tensor,
    auxiliary_hidden: list[torch.Tensor],
    weight: torch.Tensor,
    target_ids: torch.Tensor,
    beta: float,
    temperature: float,
) -> Statistics:
    """Everything of the UniSD* loss that has the size of the vocabulary."""
    index = target_ids.unsqueeze(-1)
    student = log_probs(student_hidden, weight, temperature)
    with torch.no_grad():
        teacher = log_probs(teacher_hidden, weight, temperature)
        negative = log_probs(negative_hidden, weight, temperature).gather(-1, index).squeeze(-1)
        auxiliary = torch.stack(
            [log_probs(hidden, weight, 1.0).gather(-1, index).squeeze(-1) for hidden in auxiliary_hidden]
        )
    return Statistics(
        divergence_from_log_probs(student, teacher, beta),
        student.gather(-1, index).squeeze(-1),
        teacher.gather(-1, index).squeeze(-1),
        negative,
        auxiliary,
    )


def build(inputs: Inputs, beta: float) -> Step:
    return build_from(inputs, beta, lambda function: function)


def build_from(inputs: Inputs, beta: float, prepare: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Step:
    """The step with `prepare` applied to the function that works on tensors of the vocabulary's size."""
    weight, temperature = inputs.head.weight, inputs.case.options["temperature"]

    if inputs.case.operation == "scoring":
        score = prepare(target_log_probs)

        def scoring() -> Outcome:
            with torch.no_grad():
                return Outcome(score(inputs.student_hidden, weight, inputs.target_ids, temperature), None)

        return scoring

    if inputs.case.operation == "divergence":
        diverge = prepare(divergence)

        def per_token() -> Outcome:
            result = diverge(inputs.student_hidden, inputs.teacher_hidden, weight, beta, temperature)
            return weighted_backward(result, inputs)

        return per_token

    measure = prepare(statistics)

    def unisd_star() -> Outcome:
        rows = measure(
            inputs.student_hidden,
            inputs.teacher_hidden,
            inputs.negative_hidden,
            inputs.auxiliary_hidden,
            weight,
            inputs.target_ids,
            beta,
            temperature,
        )
        loss = combine(inputs, *rows)
        return Outcome(loss.detach(), differentiate(loss, inputs))

    return unisd_star
