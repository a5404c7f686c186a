"""Log-probabilities from int8 operands, each with an interval that holds the exact one; and what that says of weights.

With any directions P [H, r] (orthonormal) and any invertible T [H, H] (`certified/coordinates.py` chooses them)

    W h = (W P) (P^T h) + W' h',    W' = W (I - P P^T) T,    h' = T^-1 (I - P P^T) h.

W' and h' are rounded row by row to int8, what is left are R and r. The logits from the rounded ones are off by
delta = R h' + int8(W') r, of which two bounds hold, by Cauchy and Schwarz:

    |delta_j|   <= e   = max_j ||R_j|| ||h'|| + max_j ||int8(W')_j|| ||r||
    ||delta||^2 <= D^2 = sigma(R)^2 ||h'||^2 + 2 sigma(R^T int8(W')) ||h'|| ||r|| + ||int8(W') r||^2

with sigma the largest singular value.
The second is what makes the interval small: it is about the length of delta itself, where the first is sqrt(H) times an
entry. Logits of the target and of the columns E whose approximate probability q_j is above a threshold t are made
exactly. Of the others, with s = sum q_j, a = min(D ||q||, e s) and b = (exp(e) - 1 - e) / e^2 min(e^2 s, D^2 t):

    max(s - a, s exp(-e)) <= sum_{j not in E} exp(z_j - l) <= min(s + a + b, s exp(e))

for the l of q_j = exp(z~_j - l), since 1 + x <= exp(x) <= 1 + x + x^2 (exp(e) - 1 - e) / e^2 for |x| <= e.
A soft cap brings logits nearer to each other, so both bounds hold behind it. Where e is above 20 nats nothing is said:
the bounds are minus infinity and 0.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from unisd_kernels.heads import LMHead
from unisd_kernels.reference.agreement import scaled_weight, sequence_weight, token_scale
from unisd_kernels.reference.logprobs import linear_logits

LARGEST_ERROR = 20.0


def int8_rows(values: torch.Tensor) -> torch.Tensor:
    """Rows rounded to the multiples of a 127th of their largest element, nearest first."""
    scale = values.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, (values / scale).round() * scale, torch.zeros_like(values))


def logprob_bounds(
    hidden: torch.Tensor,
    head: LMHead,
    target_ids: torch.Tensor,
    directions: torch.Tensor,
    transform: torch.Tensor,
    threshold: float,
    rounding: Callable[[torch.Tensor], torch.Tensor] = int8_rows,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower and upper bounds [N] of the log-probability of the target ids, at temperature 1.

    Args:
        hidden: [N, H], float64; so is the head.
        head, target_ids: as for `linear_logprobs`.
        directions: P [H, r].
        transform: T [H, H].
        threshold: columns of a larger approximate probability get exact logits.
        rounding: rows to what a code can say of them; the bounds take the error as it is, so they hold for any.
    """
    weight, project = head.active_weight, torch.eye(hidden.shape[1]).to(hidden) - directions @ directions.T
    turned, rows = weight @ project @ transform, torch.linalg.solve(transform, project @ hidden.T).T
    codes, row_codes = rounding(turned), rounding(rows)
    residual, left = turned - codes, rows - row_codes
    raw = (hidden @ directions) @ (weight @ directions).T + row_codes @ codes.T
    if head.active_bias is not None:
        raw = raw + head.active_bias
    approximate = raw * head.logit_scale
    if head.softcap is not None:
        approximate = head.softcap * torch.tanh(approximate / head.softcap)
    scale, length = abs(head.logit_scale), rows.norm(dim=-1)
    entry = scale * (residual.norm(dim=1).amax() * length + codes.norm(dim=1).amax() * left.norm(dim=-1))
    squares = (torch.linalg.matrix_norm(residual, 2) * length).square() + (left @ codes.T).square().sum(-1)
    squares = squares + 2 * torch.linalg.matrix_norm(residual.T @ codes, 2) * length * left.norm(dim=-1)
    whole = scale * squares.sqrt()

    exact = linear_logits(hidden, head)
    reference = approximate.logsumexp(-1)
    share = (approximate - reference[:, None]).exp()
    is_exact = share > threshold
    sure = torch.where(is_exact, (exact - reference[:, None]).exp(), 0.0).sum(-1)
    share = torch.where(is_exact, 0.0, share)
    rest = share.sum(-1)
    first = torch.minimum(whole * share.norm(dim=-1), entry * rest)
    curve = (torch.expm1(entry) - entry) / entry.clamp(min=1e-150).square()
    second = curve * torch.minimum(entry.square() * rest, whole.square() * threshold)
    most = sure + torch.minimum(rest + first + second, rest * entry.exp())
    least = sure + torch.maximum(rest - first, rest * (-entry).exp())
    target = exact.gather(-1, target_ids.long().unsqueeze(-1)).squeeze(-1) - reference
    lower, upper = target - most.log(), (target - least.log()).clamp(max=0.0)
    return torch.where(entry > LARGEST_ERROR, -torch.inf, lower), torch.where(entry > LARGEST_ERROR, 0.0, upper)


def weight_bounds(
    lower: torch.Tensor,
    upper: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    level: str = "token",
    statistic: str = "variance",
    gamma: float = 0.01,
    quantile: float = 0.95,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds [N] of `agreement_weights` of any log-probabilities between `lower` and `upper` [K, N].

    Square root of the variance, and range, of the views are seminorms: with m the middle of the intervals and c half
    their width, that of the scores differs from that of m by no more than the largest of an error within c, which is
    sqrt(sum c_k^2 / (K - 1)), or the sum of the two largest c_k. The weight falls in d, and rises in the quantile of
    all d, which in turn rises in every d.
    """
    if level == "sequence":
        bounds = list(pairwise(cu_seqlens.tolist()))
        lower, upper = (
            torch.stack(
                [
                    values[:, start:end].mean(1) if end > start else values.new_zeros(len(values))
                    for start, end in bounds
                ],
                1,
            )
            for values in (lower, upper)
        )
    middle, half = (lower + upper) / 2, (upper - lower) / 2
    num_views = len(lower)
    if num_views == 1:
        least = most = torch.zeros_like(middle[0])
    elif statistic == "range":
        slack = half.topk(2, dim=0).values.sum(0)
        spread = middle.amax(0) - middle.amin(0)
        least, most = (spread - slack).clamp(min=0.0), spread + slack
    else:
        freedom = num_views - (level == "token")
        slack = (half.square().sum(0) / freedom).sqrt()
        spread = (((middle - middle.mean(0)) ** 2).sum(0) / freedom).sqrt()
        least, most = (spread - slack).clamp(min=0.0).square(), (spread + slack).square()
    if level == "sequence":
        lengths = torch.tensor([end - start for start, end in bounds])
        pair = [sequence_weight(spread, gamma).repeat_interleave(lengths) for spread in (most, least)]
        return pair[0], pair[1]
    if not least.numel():
        return torch.ones_like(least), torch.ones_like(least)
    scale_low, scale_high = (token_scale(spread, quantile) for spread in (least, most))
    return scaled_weight(most, scale_low, gamma), scaled_weight(least, scale_high, gamma)
