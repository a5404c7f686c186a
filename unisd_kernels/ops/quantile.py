"""Quantiles with linear interpolation, without the 2**24 element limit of `torch.quantile`."""

from __future__ import annotations

import math

import torch


def linear_quantile(values: torch.Tensor, q: float) -> torch.Tensor:
    """The q-quantile of a 1-D tensor, linearly interpolated (the definition of numpy and torch); 0-dim, no sync.

    NaN if any value is NaN. The caller guarantees at least one value.
    """
    position = q * (values.numel() - 1)
    low = math.floor(position)
    high = min(low + 1, values.numel() - 1)
    ordered = values.sort().values  # NaN sorts last
    result = torch.lerp(ordered[low], ordered[high], position - low)
    return torch.where(ordered[-1].isnan(), ordered[-1], result)


def clip_cap(divergence: torch.Tensor, q: float) -> torch.Tensor:
    """`max(quantile_q(D), 1e-6)` of at least one divergence [N]; 0-dim, no sync."""
    return linear_quantile(divergence, q).clamp(min=1e-6)
