"""Intervals of a share, of a mean, and of the difference of two runs on the same items."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its interval.

    Attributes:
        value: the estimate; NaN of no items.
        low, high: ends; [0, 1] for a share of no items, NaN for a mean of none.
        count: items.
    """

    value: float
    low: float
    high: float
    count: int

    @property
    def leaves_out_zero(self) -> bool:
        """Whether a difference with this interval is more than chance would make it; never of no items."""
        return self.low > 0 or self.high < 0

    def percent(self) -> str:
        """For a terminal: the value and the ends in percent."""
        return f"{100 * self.value:5.1f}%  [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON, which has no NaN."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {name: None if math.isnan(x) else x for name, x in numbers.items()} | {"count": self.count}


def wilson(successes: int, count: int, confidence: float = 0.95) -> Interval:
    """Wilson's interval of a share: with z the normal quantile, p = k / n,

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    It stays inside [0, 1] and has a width at p = 0 and 1, where the textbook one has none.

    Raises:
        ValueError: more successes than items, or a negative number of them.
    """
    if not 0 <= successes <= count:
        raise ValueError(f"successes must be in 0..{count}, got {successes}")
    if count == 0:
        return Interval(math.nan, 0.0, 1.0, 0)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # Rounding must not put the estimate outside at the ends.
    return Interval(share, max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share)), count)


def mean_interval(values: Sequence[float], confidence: float = 0.95, *, draws: int = 2000, seed: int = 0) -> Interval:
    """Mean with its bootstrap interval (percentiles of the means of `draws` samples with replacement)."""
    if not values:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(values) / len(values)
    low, high = _percentiles(values, confidence, draws, seed)
    return Interval(mean, low, high, len(values))


def paired_difference(
    first: Sequence[float], second: Sequence[float], confidence: float = 0.95, *, draws: int = 2000, seed: int = 0
) -> Interval:
    """Mean of `second - first` over the same items, with its bootstrap interval.

    Items are drawn in pairs: how hard an item is then counts on both sides, so the interval is as narrow as the runs
    are alike.

    Raises:
        ValueError: different numbers of items.
    """
    if len(first) != len(second):
        raise ValueError(f"a paired difference needs the same items, got {len(first)} and {len(second)}")
    return mean_interval([b - a for a, b in zip(first, second, strict=True)], confidence, draws=draws, seed=seed)


def _percentiles(values: Sequence[float], confidence: float, draws: int, seed: int) -> tuple[float, float]:
    draw = random.Random(seed)
    count = len(values)
    means = sorted(math.fsum(draw.choices(values, k=count)) / count for _ in range(draws))
    tail = (1 - confidence) / 2
    return means[math.floor(tail * (draws - 1))], means[math.ceil((1 - tail) * (draws - 1))]
