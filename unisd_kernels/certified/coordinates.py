"""Coordinates in which rounding to int8 costs least: leading directions that stay float, and a transform of the rest.

`reference/certified.py` holds for any choice; this one makes its intervals small. A hidden state's energy lies in few
directions and few channels, and a row's int8 step is set by its largest element. So the leading directions of hidden
states are taken out, the others are scaled so that weight and hidden states
have one and the same covariance (which makes the product of their lengths, on average, smallest), and turned by a
random rotation, so that no element stands out.
"""

from __future__ import annotations

import torch

# Directions that are multiplied as floats.
RANK = 16
# Of the mean eigenvalue, added to a covariance's: some hundreds of rows do not know the directions of the next ones.
_RIDGE = 0.5


def directions_and_transform(
    hidden_covariance: torch.Tensor, weight_covariance: torch.Tensor, rank: int = RANK
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """P [H, r], T and its inverse [H, H], in float64; from second moments [H, H] of hidden states and of weight rows.

    With C and S the second moments of what P leaves, T is M^(-1/2) Q^T for a rotation Q and the geometric mean M of
    C^-1 and S, which solves M C M = S: the one for which tr(T^T S T) tr(T^-1 C T^-T) is smallest.
    """
    width = len(hidden_covariance)
    _, vectors = torch.linalg.eigh(hidden_covariance)
    lead = vectors[:, width - min(rank, width // 4) :]
    left = torch.eye(width, dtype=torch.float64, device=lead.device) - lead @ lead.T
    of_hidden, of_weight = (_ridged(left @ moments @ left) for moments in (hidden_covariance, weight_covariance))
    root, inverse_root = _power(of_hidden, 0.5), _power(of_hidden, -0.5)
    mean = inverse_root @ _power(root @ of_weight @ root, 0.5) @ inverse_root
    generator = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    rotation = rotation.to(lead.device)
    return lead, _power(mean, -0.5) @ rotation.T, rotation @ _power(mean, 0.5)


def _ridged(moments: torch.Tensor) -> torch.Tensor:
    ridge = _RIDGE * moments.diagonal().mean().clamp(min=1e-30)
    return moments + ridge * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)


def _power(moments: torch.Tensor, exponent: float) -> torch.Tensor:
    """Power of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh((moments + moments.T) / 2)
    return (vectors * values.clamp(min=1e-12 * values[-1]) ** exponent) @ vectors.T
