"""The log-linear mixture of several views: their distributions to the power of weights, multiplied and normalized."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unisd_kernels.heads import LMHead
from unisd_kernels.reference.logprobs import linear_logits


def mixture_log_probs(
    views: Sequence[torch.Tensor], weights: Sequence[float], heads: Sequence[LMHead], temperature: float = 1.0
) -> torch.Tensor:
    """`sum_k a_k log p_k - log sum_j exp(sum_k a_k log p_kj)`, [N, V]; any heads of one vocabulary, any weights."""
    scores = [
        weight * torch.log_softmax(linear_logits(view, head, temperature), dim=-1)
        for view, weight, head in zip(views, weights, heads, strict=True)
    ]
    return torch.log_softmax(torch.stack(scores).sum(0), dim=-1)
