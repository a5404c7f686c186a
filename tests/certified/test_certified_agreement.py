"""Weights from int8 scores are within the tolerance of the exact ones, whatever has to be scored again for that."""

from __future__ import annotations

import pytest
import torch

from tests.certified.problems import views_problem
from unisd_kernels import reference
from unisd_kernels.certified.agreement import certified_agreement, settled, weight_bounds
from unisd_kernels.certified.int8_head import Int8Head
from unisd_kernels.certified.scores import LogProbBounds
from unisd_kernels.reference.certified import weight_bounds as reference_bounds

LEVELS = [(level, statistic) for level in ("token", "sequence") for statistic in ("variance", "range")]


def agreement(problem, tolerance, threshold=3e-2, **settings):
    def score(hidden, ids):
        return reference.linear_logprobs(hidden, problem.head, ids).logprobs

    ready = Int8Head.of(problem.head, problem.others)
    return certified_agreement(
        problem.views,
        ready,
        problem.target_ids,
        problem.cu_seqlens,
        score=score,
        tolerance=tolerance,
        threshold=threshold,
        **settings,
    )


def exact_agreement(problem, **settings):
    scores = [reference.linear_logprobs(view, problem.head, problem.target_ids).logprobs for view in problem.views]
    return torch.stack(scores), reference.agreement_weights(torch.stack(scores), problem.cu_seqlens, **settings)


def check_tolerance(seed: int, tolerance: float, **settings) -> float:
    problem = views_problem(seed, num_views=1 + seed % 4)
    scores, exact = exact_agreement(problem, **settings)
    found = agreement(problem, tolerance, **settings)
    assert float((found.weights - exact.weights).abs().max()) <= tolerance + 1e-9, seed
    again = found.rescored
    torch.testing.assert_close(found.logprobs[:, again], scores[:, again], rtol=1e-11, atol=1e-11)
    return float(found.rescored.double().mean())


@pytest.mark.parametrize(("level", "statistic"), LEVELS)
def test_weights_are_within_the_tolerance(level, statistic):
    shares = [
        check_tolerance(seed, tolerance, level=level, statistic=statistic, gamma=1.0)
        for seed in range(12)
        for tolerance in (0.01, 0.1)
    ]
    assert 0.0 < sum(shares) / len(shares) < 1.0


@pytest.mark.exhaustive
@pytest.mark.parametrize(("level", "statistic"), LEVELS)
def test_weights_are_within_the_tolerance_on_many_problems(level, statistic):
    for seed in range(1000):
        tolerance, gamma = (0.003, 0.05, 0.2)[seed % 3], (0.1, 1.0, 10.0)[seed // 3 % 3]
        check_tolerance(seed, tolerance, level=level, statistic=statistic, gamma=gamma)


@pytest.mark.parametrize(("level", "statistic"), LEVELS)
def test_weights_are_within_the_tolerance_of_any_scores_in_the_bounds(level, statistic):
    """The scores are where they differ most from the middle; those of int8 products hardly ever are."""
    settings = {"level": level, "statistic": statistic, "gamma": 1.0}
    cu_seqlens = torch.arange(0, 61, 3)
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        middle = -2 * torch.rand(3, 60, generator=generator, dtype=torch.float64)
        widest = 0.1 if level == "token" else 0.05  # a mean over tokens has no narrow ones
        half = widest * torch.rand(3, 60, generator=generator, dtype=torch.float64) ** 3
        outwards = torch.sign(middle - middle.mean(0)) * (1 if seed % 2 else -1)
        scores = middle + half * outwards
        bounds = LogProbBounds(middle - half, middle + half)
        found = settled(bounds, lambda places: scores[:, places], cu_seqlens, tolerance=0.02, **settings)  # noqa: B023
        exact = reference.agreement_weights(scores, cu_seqlens, **settings)
        assert float((found.weights - exact.weights).abs().max()) <= 0.02 + 1e-9, seed
        assert not bool(found.rescored.all()), seed


def test_with_no_tolerance_everything_is_exact():
    problem = views_problem(2, num_rows=9, width=16, columns=150, size=3.0, apart=0.3)
    _, exact = exact_agreement(problem, gamma=1.0)
    found = agreement(problem, 0.0, gamma=1.0)
    torch.testing.assert_close(found.weights, exact.weights)
    assert bool(found.rescored.all())


def test_sure_tokens_are_not_scored_again():
    problem = views_problem(2, num_rows=40, width=16, columns=150, size=3.0, apart=0.3)
    assert not bool(agreement(problem, 0.2, threshold=1e-3, gamma=1.0).rescored.any())


@pytest.mark.parametrize(("level", "statistic"), LEVELS)
@pytest.mark.parametrize("num_views", [1, 2, 5])
def test_bounds_of_weights(level, statistic, num_views):
    generator = torch.Generator().manual_seed(num_views)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    middle, half = -3 * uniform(num_views, 30), 0.3 * uniform(num_views, 30)
    bounds = LogProbBounds(middle - half, middle + half)
    cu_seqlens = torch.tensor([0, 4, 4, 21, 30])
    settings = {"level": level, "statistic": statistic, "gamma": 1.0}
    low, high = weight_bounds(bounds, cu_seqlens, **settings)
    for ours, expected in zip((low, high), reference_bounds(*bounds, cu_seqlens, **settings), strict=True):
        torch.testing.assert_close(ours, expected)
    for _ in range(50):
        # In the corners, where the extremes are.
        scores = middle + half * torch.sign(uniform(num_views, 30) - 0.5) * (1 - uniform(num_views, 30) ** 8)
        weights = reference.agreement_weights(scores, cu_seqlens, **settings).weights
        assert bool(((weights >= low - 1e-12) & (weights <= high + 1e-12)).all())
    widest = (high - low).max()
    assert (widest == 0) if num_views == 1 else (0 < widest < 1)
