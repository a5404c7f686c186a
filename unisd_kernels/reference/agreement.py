"""Multi-teacher agreement: views that disagree on the sampled token lend it less weight."""

from __future__ import annotations

from itertools import pairwise

import torch

from unisd_kernels.results import AgreementWeights


def disagreement(scores: torch.Tensor, statistic: str, unbiased: bool) -> torch.Tensor:
    """Spread of [K, M] scores over the K views: variance (0 for K = 1) or range, [M]."""
    if statistic == "range":
        return scores.amax(0) - scores.amin(0)
    if scores.shape[0] == 1 or scores.numel() == 0:  # `var` warns about both
        return torch.zeros_like(scores[0])
    return scores.var(dim=0, correction=int(unbiased))


def token_weight(spread: torch.Tensor, gamma: float, quantile: float = 0.95) -> torch.Tensor:
    """`w_n = max(1 / (1 + gamma * min(d_n / max(quantile_0.95(d), 1e-6), 10)), 0.01)`."""
    if spread.numel() == 0:
        return torch.ones_like(spread)
    return scaled_weight(spread, token_scale(spread, quantile), gamma)


def token_scale(spread: torch.Tensor, quantile: float) -> torch.Tensor:
    """`max(quantile_0.95(d), 1e-6)`."""
    return torch.quantile(spread, quantile).clamp(min=1e-6)


def scaled_weight(spread: torch.Tensor, scale: torch.Tensor, gamma: float) -> torch.Tensor:
    """`token_weight` under a scale that is given."""
    return (1.0 / (1.0 + gamma * (spread / scale).clamp(max=10.0))).clamp(min=0.01)


def sequence_weight(spread: torch.Tensor, gamma: float) -> torch.Tensor:
    """`w_b = max(exp(-gamma * d_b), 1e-6)`."""
    return torch.exp(-gamma * spread).clamp(min=1e-6)


@torch.no_grad()
def agreement_weights(
    logprobs: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    level: str = "token",
    statistic: str = "variance",
    gamma: float = 0.01,
    quantile: float = 0.95,
) -> AgreementWeights:
    """Weights [N] from `logprobs` [K, N] scored at temperature 1; ones when K = 0. No gradient."""
    logprobs = logprobs if logprobs.dtype == torch.float64 else logprobs.float()
    num_views, num_rows = logprobs.shape
    bounds = cu_seqlens.tolist()
    num_sequences = len(bounds) - 1
    if num_views == 0:
        return AgreementWeights(
            logprobs.new_ones(num_rows), logprobs.new_zeros(num_rows if level == "token" else num_sequences)
        )
    if level == "token":
        spread = disagreement(logprobs, statistic, unbiased=True)
        return AgreementWeights(token_weight(spread, gamma, quantile), spread)
    means = logprobs.new_zeros(num_views, num_sequences)
    for b, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            means[:, b] = logprobs[:, start:end].mean(dim=1)
    spread = disagreement(means, statistic, unbiased=False)
    weights = logprobs.new_ones(num_rows)
    for b, (start, end) in enumerate(pairwise(bounds)):
        weights[start:end] = sequence_weight(spread[b], gamma)
    return AgreementWeights(weights, spread)
