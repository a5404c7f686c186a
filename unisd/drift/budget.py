"""A bound on the drift, kept by the learning rate, and with LoRA by shrinking what was learned.

Near the base the drift is quadratic in how far the weights have moved, so its square root grows with the sum of the
learning rates. From two measurements that gives a speed: the growth of sqrt(drift) per step at a scale of 1. The scale
of the next steps is then chosen such that sqrt(drift) goes no further by the next measurement than it may; far from the
budget that is 1, and the run is what it would be without.

Where what was learned can be shrunk (`unisd.drift.shrink`), it may go half of sqrt(budget) each time, and is put back
under the budget where it passed it. Else it may go half of the way that is left; once the budget is used up no step is
left that would not exceed it, and the run stops: a collapse, whose speed grows from step to step, included.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

_GROWTH = 2.0
"""Most by which the scale rises from one measurement to the next."""
_LEAST = 1e-3
"""Scale that is tried again where the drift fell meanwhile."""


@dataclass
class DriftBudget:
    """State of the control.

    Attributes:
        budget: nats a token, above 0.
        scale: factor of the learning rate until the next measurement, in [0, 1].
        step, drift: of the latest measurement.
        speed: growth of sqrt(drift) per step at a scale of 1: the latest that was seen, or half of the one before where
            that is more (the first step's is far above later ones'); 0 where none was.
        is_used_up: whether the drift has reached the budget and was not put back, or is not a number.
        can_shrink: whether it can be put back.
    """

    budget: float
    scale: float = 1.0
    step: int = 0
    drift: float = 0.0
    speed: float = 0.0
    is_used_up: bool = False
    can_shrink: bool = False

    def update(self, step: int, drift: float, next_steps: int, left_at: float | None = None) -> None:
        """Take a measurement and choose the scale of the next steps.

        Args:
            step: after which optimizer step it was made.
            drift: KL(base || now), nats a token.
            next_steps: optimizer steps until the next one.
            left_at: the drift after it was shrunk, where it was.
        """
        reached = drift if left_at is None else left_at
        if not reached < self.budget:  # a NaN too
            self.step, self.drift, self.scale, self.is_used_up = step, reached, 0.0, True
            return
        steps = step - self.step
        moved = math.sqrt(max(drift, 0.0)) - math.sqrt(max(self.drift, 0.0))
        self.step, self.drift = step, reached
        if steps <= 0:
            return
        if self.scale > 0:
            self.speed = max(moved / (steps * self.scale), self.speed / 2)
        if self.speed == 0:
            return
        left = math.sqrt(self.budget) - (0.0 if self.can_shrink else math.sqrt(max(reached, 0.0)))
        wanted = left / 2 / (self.speed * max(1, next_steps))
        self.scale = min(1.0, wanted, max(_LEAST, _GROWTH * self.scale))

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    def restore(self, saved: dict[str, Any]) -> None:
        """The state of a checkpoint, under the budget of now."""
        for name, value in saved.items():
            if name not in ("budget", "can_shrink"):
                setattr(self, name, value)
        self.is_used_up = not self.drift < self.budget
