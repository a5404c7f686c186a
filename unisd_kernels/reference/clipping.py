"""Clipping of a token's divergence, after the sum over the vocabulary."""

from __future__ import annotations

import torch


def clip_cap_from_quantile(divergence: torch.Tensor, q: float) -> torch.Tensor:
    """`max(quantile_q(D over valid tokens), 1e-6)`; no gradient flows through the cap."""
    return torch.quantile(divergence.detach(), q).clamp(min=1e-6)


def clip_divergence(divergence: torch.Tensor, cap: float | torch.Tensor) -> torch.Tensor:
    """`min(D, cap)`: the gradient is zero above the cap and untouched at or below it."""
    # In the divergence's dtype from the start: a float alone would become float32.
    limit = torch.as_tensor(cap, dtype=divergence.dtype, device=divergence.device)
    return torch.where(divergence.detach() > limit, limit, divergence)
