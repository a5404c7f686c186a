"""The divergence between teacher and student, `beta` as in GKD and TRL."""

from __future__ import annotations

import math

import torch

from unisd_kernels.heads import LMHead
from unisd_kernels.reference.logprobs import linear_logits


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """`KL(p || q) = sum_j p_j (log p_j - log q_j)`, over the last dimension."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def divergence_from_log_probs(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """D of [N, V] log-probabilities:

        beta = 0      KL(p_t || p_s)
        beta = 1      KL(p_s || p_t)
        otherwise     beta KL(p_t || m) + (1 - beta) KL(p_s || m),   m = (1 - beta) p_s + beta p_t

    `log m` is taken with logaddexp, so it is finite where both probabilities underflow.
    """
    if beta == 0.0:
        return kl(teacher, student)
    if beta == 1.0:
        return kl(student, teacher)
    log_m = torch.logaddexp(student + math.log(1.0 - beta), teacher + math.log(beta))
    return beta * kl(teacher, log_m) + (1.0 - beta) * kl(student, log_m)


def linear_divergence(
    student_hidden: torch.Tensor,
    student_head: LMHead,
    teacher_hidden: torch.Tensor,
    teacher_head: LMHead,
    beta: float = 0.0,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Per-token divergence [N] from hidden states; no gradient reaches the teacher."""
    student = torch.log_softmax(linear_logits(student_hidden, student_head, temperature), dim=-1)
    with torch.no_grad():
        teacher = torch.log_softmax(linear_logits(teacher_hidden, teacher_head, temperature), dim=-1)
    return divergence_from_log_probs(student, teacher, beta)
