"""The dense formulas, each logits tensor made once: with float32 statistics, as a careful user writes them, or with the
log-softmax in bfloat16, as the public code of the paper takes it from a bfloat16 model.

The functions of tensors stand alone, so that `compiled.py` can hand the same ones to torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from bench.cases import Case
from bench.peers.reduction import combine
from bench.peers.step import Outcome, Step, differentiate, weighted_backward
from unisd_kernels.config import LossInputs
from unisd_kernels.reference import divergence_from_log_probs


def logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float, dtype: torch.dtype) -> torch.Tensor:
    """[N, V] from hidden [N, H] and weight [V, H]: the product in their dtype, everything after it in `dtype`."""
    return (hidden @ weight.T).to(dtype) / temperature


def log_probs(hidden: torch.Tensor, weight: torch.Tensor, temperature: float, dtype: torch.dtype) -> torch.Tensor:
    """[N, V]"""
    return torch.log_softmax(logits(hidden, weight, temperature, dtype), dim=-1)


def target_log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, temperature: float, dtype: torch.dtype
) -> torch.Tensor:
    """`z_y - logsumexp(z)`, [N]; only the logits are held."""
    z = logits(hidden, weight, temperature, dtype)
    return z.gather(-1, target_ids.unsqueeze(-1)).squeeze(-1) - z.logsumexp(-1)


def divergence(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    weight: torch.Tensor,
    beta: float,
    temperature: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """D [N] of hidden states [N, H]."""
    student = log_probs(student_hidden, weight, temperature, dtype)
    with torch.no_grad():
        teacher = log_probs(teacher_hidden, weight, temperature, dtype)
    return divergence_from_log_probs(student, teacher, beta)


class Statistics(NamedTuple):
    """Divergences and log-probabilities of the rows, [N]; `auxiliary` [K, N]."""

    divergence: torch.Tensor
    student: torch.Tensor
    teacher: torch.Tensor
    negative: torch.Tensor
    auxiliary: torch.Tensor


def statistics(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    negative_hidden: torch.Tensor,
    auxiliary_hidden: Sequence[torch.Tensor],
    weight: torch.Tensor,
    target_ids: torch.Tensor,
    beta: float,
    temperature: float,
    dtype: torch.dtype,
) -> Statistics:
    """Everything of the UniSD* loss that has the size of the vocabulary; hidden states [N, H], weight [V, H]."""
    index = target_ids.unsqueeze(-1)
    student = log_probs(student_hidden, weight, temperature, dtype)
    with torch.no_grad():
        teacher = log_probs(teacher_hidden, weight, temperature, dtype)
        negative = log_probs(negative_hidden, weight, temperature, dtype).gather(-1, index).squeeze(-1)
        views = [log_probs(hidden, weight, 1.0, dtype).gather(-1, index).squeeze(-1) for hidden in auxiliary_hidden]
        auxiliary = torch.stack(views) if views else negative.new_empty(0, len(negative))
    return Statistics(
        divergence_from_log_probs(student, teacher, beta),
        student.gather(-1, index).squeeze(-1),
        teacher.gather(-1, index).squeeze(-1),
        negative,
        auxiliary,
    )


def build(case: Case, beta: float, device: torch.device, dtype: torch.dtype = torch.float32) -> Step:
    return build_from(case, beta, dtype, lambda function: function)


def build_from(
    case: Case, beta: float, dtype: torch.dtype, prepare: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Step:
    """The step with `prepare` applied to the function that works on tensors of the vocabulary's size."""
    temperature = case.options["temperature"]
    score, diverge, measure = (prepare(function) for function in (target_log_probs, divergence, statistics))

    def scoring(inputs: LossInputs) -> Outcome:
        with torch.no_grad():
            result = score(inputs.student_hidden, inputs.student_head.weight, inputs.target_ids, temperature, dtype)
            return Outcome(result, None)

    def per_token(inputs: LossInputs) -> Outcome:
        result = diverge(
            inputs.student_hidden, inputs.teacher_hidden, inputs.student_head.weight, beta, temperature, dtype
        )
        return weighted_backward(result, inputs)

    def unisd_star(inputs: LossInputs) -> Outcome:
        rows = measure(
            inputs.student_hidden,
            inputs.teacher_hidden,
            inputs.negative_hidden,
            inputs.auxiliary_hidden,
            inputs.student_head.weight,
            inputs.target_ids,
            beta,
            temperature,
            dtype,
        )
        # Numbers a row: in float32 like the statistics of any peer.
        loss = combine(case, inputs, *(row.float() for row in rows))
        return Outcome(loss.detach(), differentiate(loss, inputs))

    return {"scoring": scoring, "divergence": per_token, "unisd_loss": unisd_star}[case.operation]
