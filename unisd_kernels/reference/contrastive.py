"""The token-level contrastive hinge."""

from __future__ import annotations

import torch


def contrastive_hinge(
    student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, negative_logprobs: torch.Tensor, margin: float
) -> torch.Tensor:
    """`C_n = relu(margin + |lp_s - lp_t| - |lp_s - lp_n|)`, [N]; gradient to the student's log-probabilities only."""
    to_teacher = (student_logprobs - teacher_logprobs.detach()).abs()
    to_negative = (student_logprobs - negative_logprobs.detach()).abs()
    return torch.relu(margin + to_teacher - to_negative)
