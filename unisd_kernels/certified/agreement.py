"""Agreement weights from int8 scores: tokens whose weight is not sure enough are scored again, exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch

from unisd_kernels.certified.int8_head import Int8Head
from unisd_kernels.certified.scores import THRESHOLD, LogProbBounds, logprob_bounds
from unisd_kernels.ops.agreement import agreement_weights, sequence_weight, token_scale, token_weight
from unisd_kernels.packing import sequence_ids, sequence_lengths, sequence_sums

# Of the tokens that only the quantile depends on, this share is scored again at a time, widest first; and at least so
# many, since a few rows take about as long as one: the whole weight is read.
_SHARE, _LEAST = 0.25, 8


class CertifiedAgreement(NamedTuple):
    """Log-probabilities [K, N], weights [N] and disagreement ([N], or [B] for sequences), and what was scored exactly
    (bool [N]). Each weight is within the tolerance of the one that exact scores give."""

    logprobs: torch.Tensor
    weights: torch.Tensor
    disagreement: torch.Tensor
    rescored: torch.Tensor


@torch.no_grad()
def certified_agreement(
    views: Sequence[torch.Tensor],
    ready: Int8Head,
    target_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    tolerance: float,
    level: str = "token",
    statistic: str = "variance",
    gamma: float = 0.01,
    threshold: float = THRESHOLD,
    impl: Literal["native", "torch"] = "torch",
) -> CertifiedAgreement:
    """Weights of N tokens from K views [N, H].

    Args:
        score: exact log-probabilities of rows and their ids.
        tolerance: largest error of a weight.
        threshold, impl: of `logprob_bounds`.
    """
    num_views, num_rows = len(views), len(target_ids)
    # Token by token, so that the views of one share their exact columns.
    rows = torch.stack(tuple(views), dim=1).flatten(0, 1)
    found = logprob_bounds(rows, ready, target_ids.repeat_interleave(num_views), threshold, impl)
    bounds = LogProbBounds(*(values.view(num_rows, num_views).T.contiguous() for values in found))

    def exact(places: torch.Tensor) -> torch.Tensor:
        chosen = torch.cat([view.index_select(0, places) for view in views])
        return score(chosen, target_ids[places].repeat(num_views)).view(num_views, -1)

    return settled(bounds, exact, cu_seqlens, tolerance=tolerance, level=level, statistic=statistic, gamma=gamma)


@torch.no_grad()
def settled(
    bounds: LogProbBounds,
    exact: Callable[[torch.Tensor], torch.Tensor],
    cu_seqlens: torch.Tensor,
    *,
    tolerance: float,
    level: str = "token",
    statistic: str = "variance",
    gamma: float = 0.01,
) -> CertifiedAgreement:
    """Weights from bounds [K, N], which are narrowed in place until every weight is within the tolerance.

    Args:
        exact: the log-probabilities [K, n] of the tokens at some places [n].
    """
    rescored = torch.zeros(bounds.lower.shape[1], dtype=torch.bool)
    settings: dict[str, Any] = {"level": level, "statistic": statistic, "gamma": gamma}
    again = ~(bounds.lower.isfinite() & bounds.upper.isfinite()).all(0)
    while True:
        if bool(again.any()):
            places = again.nonzero().squeeze(-1)
            scores = exact(places)
            for values in bounds:
                values[:, places] = scores
            rescored |= again
        middle = bounds.middle
        weights, disagreement = agreement_weights(middle, cu_seqlens, **settings)
        again = ~rescored & _unsure(bounds, weights, cu_seqlens, tolerance, rescored, **settings)
        if not bool(again.any()):
            return CertifiedAgreement(middle, weights, disagreement, rescored)


def weight_bounds(
    bounds: LogProbBounds, cu_seqlens: torch.Tensor, level: str, statistic: str, gamma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds [N] of the weights; the formulas are in `reference/certified.py`."""
    least, most = _spread_bounds(bounds, cu_seqlens, level, statistic)
    if level == "sequence":
        low, high = (sequence_weight(spread, gamma) for spread in (most, least))
        ids = sequence_ids(cu_seqlens, bounds.lower.shape[1])
        return low[ids], high[ids]
    return token_weight(most, token_scale(least), gamma), token_weight(least, token_scale(most), gamma)


def _unsure(
    bounds: LogProbBounds,
    weights: torch.Tensor,
    cu_seqlens: torch.Tensor,
    tolerance: float,
    rescored: torch.Tensor,
    level: str,
    statistic: str,
    gamma: float,
) -> torch.Tensor:
    """Tokens to be scored next (bool [N]); none where every weight is sure."""
    low, high = weight_bounds(bounds, cu_seqlens, level, statistic, gamma)
    wide = torch.maximum(high - weights, weights - low) > tolerance
    if level == "sequence" or not bool(wide.any()):
        return wide
    least, most = _spread_bounds(bounds, cu_seqlens, level, statistic)
    scale_low, scale_high = token_scale(least), token_scale(most)
    middle = (scale_low + scale_high) / 2
    by_itself = token_weight(least, middle, gamma) - token_weight(most, middle, gamma) > 2 * tolerance
    if bool((by_itself & ~rescored).any()):
        return by_itself
    # The rest is the quantile's doing, and that is a matter of the tokens around it.
    around = (most >= scale_low) & (least <= scale_high) & ~rescored & (most > least)
    if not bool(around.any()):
        return wide
    width = torch.where(around, most - least, -1.0)
    candidates = int(around.sum())
    count = min(candidates, max(_LEAST, int(_SHARE * candidates)))
    return torch.zeros_like(around).index_fill_(0, width.topk(count).indices, True)


def _spread_bounds(
    bounds: LogProbBounds, cu_seqlens: torch.Tensor, level: str, statistic: str
) -> tuple[torch.Tensor, torch.Tensor]:
    middle, half = bounds.middle, (bounds.upper - bounds.lower) / 2
    if level == "sequence":
        lengths = sequence_lengths(cu_seqlens).clamp(min=1)
        middle, half = (sequence_sums(values, cu_seqlens) / lengths for values in (middle, half))
    num_views = len(middle)
    if num_views == 1:
        return torch.zeros_like(middle[0]), torch.zeros_like(middle[0])
    if statistic == "range":
        slack = half.topk(2, dim=0).values.sum(0)
        spread = middle.amax(0) - middle.amin(0)
        return (spread - slack).clamp(min=0.0), spread + slack
    freedom = num_views - (level == "token")
    slack = (half.square().sum(0) / freedom).sqrt()
    spread = ((middle - middle.mean(0)).square().sum(0) / freedom).sqrt()
    return (spread - slack).clamp(min=0.0).square(), (spread + slack).square()
