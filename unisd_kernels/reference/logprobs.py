"""Logits of a head, and the log-probability, log-sum-exp and entropy of each row."""

from __future__ import annotations

import torch

from unisd_kernels.dtypes import statistics_dtype
from unisd_kernels.heads import LMHead
from unisd_kernels.results import LinearLogProbs


def linear_logits(hidden: torch.Tensor, head: LMHead, temperature: float = 1.0) -> torch.Tensor:
    """`z = softcap_c(a * (h W^T + b)) / tau`, [N, V] in float32 (float64 for float64 inputs).

    A row in which any `a * (h W^T + b) / tau` is NaN or infinite is NaN: minus infinity would drop out of the softmax,
    and the cap would make either infinity a number.
    """
    head.require_whole("the dense reference (impl='reference')")
    dtype = statistics_dtype(hidden.dtype)
    logits = hidden.to(dtype) @ head.active_weight.to(dtype).T
    if head.active_bias is not None:
        logits = logits + head.active_bias.to(dtype)
    logits = logits * head.logit_scale
    finite = (logits.detach() / temperature).isfinite().all(-1, keepdim=True)
    logits = logits + torch.where(finite, 0.0, torch.nan).to(dtype)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits / temperature


def linear_logprobs(
    hidden: torch.Tensor,
    head: LMHead,
    target_ids: torch.Tensor,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> LinearLogProbs:
    """`logp(y) = z_y - logsumexp(z)` and `entropy = logsumexp(z) - sum_j p_j z_j`, each [N]."""
    logits = linear_logits(hidden, head, temperature)
    logsumexp = torch.logsumexp(logits, dim=-1)
    target_logits = logits.gather(-1, target_ids.long().unsqueeze(-1)).squeeze(-1)
    entropy = None
    if return_entropy:
        log_probs = torch.log_softmax(logits, dim=-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
    return LinearLogProbs(target_logits - logsumexp, logsumexp, entropy)
