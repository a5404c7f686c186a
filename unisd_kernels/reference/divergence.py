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

    `log(m / p_s)` and `log(m / p_t)` are taken with logaddexp from `log p_t - log p_s`, so they are finite where both
    probabilities underflow, and keep their digits where beta is so near 0 or 1 that one of them is next to nothing.

    Not negative: below zero there is only rounding, which is cut off without cutting the gradient.
    """
    if beta == 0.0:
        divergence = kl(teacher, student)
    elif beta == 1.0:
        divergence = kl(student, teacher)
    else:
        difference = teacher - student
        log_share, log_rest = (difference.new_full((), value) for value in (math.log(beta), math.log1p(-beta)))
        from_student = torch.logaddexp(log_rest, difference + log_share)  # log m - log p_s
        from_teacher = torch.logaddexp(log_share, log_rest - difference)  # log m - log p_t
        kl_teacher = -(teacher.exp() * from_teacher).sum(-1)
        kl_student = -(student.exp() * from_student).sum(-1)
        divergence = beta * kl_teacher + (1.0 - beta) * kl_student
    return torch.where(divergence < 0.0, divergence - divergence.detach(), divergence)


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
