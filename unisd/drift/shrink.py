"""Back to a bound on the drift: what a LoRA adapter has changed, made smaller.

The change is B A, so with s B it is s times as large, and for small ones the drift goes with s^2. What was learned
keeps its direction; a smaller learning rate instead would leave the first, noisiest steps in and learn no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

_TRIES = 6
_NEAR = 0.85, 1.0
"""Of the bound, between which the search ends; it aims at their middle."""


def can_shrink(model: nn.Module) -> bool:
    """Whether all that is trained are LoRA's two factors: else the change is not theirs alone."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return bool(names) and all(".lora_A." in name or ".lora_B." in name for name in names)


@torch.no_grad()
def shrink(model: nn.Module, measure: Callable[[nn.Module], float], drift: float, bound: float) -> tuple[float, float]:
    """Multiply every B by the s whose drift is 0.85 to 1 times the bound, found by regula falsi on its square root.

    Args:
        model: for which `can_shrink` holds.
        measure: of the drift.
        drift: at s = 1, at least the bound.
        bound: nats a token.

    Returns:
        (s, drift there); where none is found the largest s that was tried with a drift below the bound, at last 0.
    """
    factors = [p for name, p in model.named_parameters() if ".lora_B." in name and p.requires_grad]
    before = [p.detach().clone() for p in factors]
    aim = math.sqrt(sum(_NEAR) / 2 * bound)
    low, high = (0.0, 0.0), (1.0, math.sqrt(drift))  # (s, square root of the drift)
    for _ in range(_TRIES):
        s = low[0] + (aim - low[1]) / (high[1] - low[1]) * (high[0] - low[0])
        _set(factors, before, s)
        found = measure(model)
        if _NEAR[0] * bound <= found < _NEAR[1] * bound:
            return s, found
        if found < bound:
            low = s, math.sqrt(max(found, 0.0))
        else:
            high = s, math.sqrt(found) if math.isfinite(found) else high[1]
    _set(factors, before, low[0])
    return low[0], low[1] ** 2


def _set(factors: list[nn.Parameter], before: list[torch.Tensor], s: float) -> None:
    for parameter, whole in zip(factors, before, strict=True):
        parameter.copy_(whole * s)
