"""Wilson's interval by hand, and the bootstrap against what it estimates."""

import math
import random

import pytest

from unisd.scoring import mean_interval, paired_difference, wilson


def test_wilson_by_hand():
    # Newcombe 1998, table I: 81 of 263 and 15 of 148, 0 of 20 and 1 of 29, 95%.
    for successes, count, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        interval = wilson(successes, count)
        assert (interval.low, interval.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
        assert interval.value == successes / count
    assert (wilson(0, 5).low, wilson(5, 5).high) == (0.0, 1.0)
    none = wilson(0, 0)
    assert math.isnan(none.value)
    assert none.as_dict() == {"value": None, "low": 0.0, "high": 1.0, "count": 0}
    with pytest.raises(ValueError, match=r"successes must be in 0\.\.3, got 4"):
        wilson(4, 3)


def test_wilson_covers():
    draw = random.Random(0)
    hits = sum(
        (lambda i: i.low <= 0.3 <= i.high)(wilson(sum(draw.random() < 0.3 for _ in range(40)), 40)) for _ in range(2000)
    )
    assert 0.93 < hits / 2000 < 0.97


def test_bootstrap_is_about_the_normal_interval():
    draw = random.Random(0)
    values = [draw.random() for _ in range(400)]
    interval = mean_interval(values)
    half = 1.96 * math.sqrt(1 / 12 / 400)
    assert interval.value == pytest.approx(sum(values) / 400)
    assert interval.value - interval.low == pytest.approx(half, rel=0.15)
    assert interval.high - interval.value == pytest.approx(half, rel=0.15)
    assert mean_interval([0.25] * 7).low == mean_interval([0.25] * 7).high == 0.25
    assert math.isnan(mean_interval([]).low)
    assert mean_interval([]).as_dict()["value"] is None


def test_pairs_are_narrower_than_runs_apart():
    draw = random.Random(1)
    hard = [draw.random() for _ in range(200)]
    first = [float(draw.random() < h) for h in hard]
    second = [min(1.0, f + float(draw.random() < 0.1)) for f in first]
    difference = paired_difference(first, second)
    assert difference.value == pytest.approx(sum(second) / 200 - sum(first) / 200)
    assert 0 < difference.low < difference.value < difference.high
    alone = mean_interval(second)
    assert difference.high - difference.low < (alone.high - alone.low) / 1.5
    assert paired_difference(second, first).value == -difference.value
    with pytest.raises(ValueError, match="the same items, got 2 and 1"):
        paired_difference([1, 0], [1])
