"""Intervals from int8 products hold the exact log-probability, and are those of the reference."""

from __future__ import annotations

import pytest
import torch

from tests.certified.problems import views_problem
from unisd_kernels import LMHead, reference
from unisd_kernels.certified import int8_head
from unisd_kernels.certified.coordinates import directions_and_transform
from unisd_kernels.certified.int8_head import Int8Head, ready_head
from unisd_kernels.certified.scores import logprob_bounds
from unisd_kernels.reference.certified import int8_rows
from unisd_kernels.reference.certified import logprob_bounds as reference_bounds

# One never makes a column exact, the last all that matter.
THRESHOLDS = (1.0, 3e-2, 1e-3)


def coordinates(problem):
    weight, rows = problem.head.active_weight, problem.others
    lead, transform, _ = directions_and_transform(rows.T @ rows / len(rows), weight.T @ weight / len(weight))
    return lead, transform


def check_bounds(seed: int, dtype: torch.dtype, impl: str = "torch") -> bool:
    """Every bound of one random problem holds; whether they say something (a width below a tenth of a nat)."""
    problem = views_problem(seed, num_views=1)
    exact = reference.linear_logprobs(problem.views[0], problem.head, problem.target_ids).logprobs
    narrow = problem.to(dtype)
    ready = Int8Head.of(narrow.head, narrow.others)
    # What float32 itself makes of the exact columns.
    slack = 3e-6 * (1.0 + exact.abs()) if dtype == torch.float32 else 0.0
    for threshold in THRESHOLDS:
        lower, upper = logprob_bounds(narrow.views[0], ready, narrow.target_ids, threshold, impl)
        assert bool((lower.double() <= exact + slack).all()), (seed, threshold, lower - exact)
        assert bool((upper.double() >= exact - slack).all()), (seed, threshold, exact - upper)
    return bool(((upper - lower) < 0.1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds_hold(dtype):
    assert sum(check_bounds(seed, dtype) for seed in range(60)) > 30


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(10))
def test_bounds_hold_on_ten_thousand_problems(part):
    seeds = range(1000 * part, 1000 * (part + 1))
    assert sum(check_bounds(seed, torch.float64 if seed % 2 else torch.float32) for seed in seeds) > 500


@pytest.mark.parametrize("seed", range(8))
def test_bounds_of_the_reference_hold_and_are_these(seed):
    problem = views_problem(seed, num_views=1)
    hidden, ready = problem.views[0], Int8Head.of(problem.head, problem.others)
    exact = reference.linear_logprobs(hidden, problem.head, problem.target_ids).logprobs
    for threshold in THRESHOLDS:
        lower, upper = reference_bounds(hidden, problem.head, problem.target_ids, *coordinates(problem), threshold)
        assert bool((lower <= exact + 1e-9).all())
        assert bool((upper >= exact - 1e-9).all())
        if threshold == 1.0:
            ours = logprob_bounds(hidden, ready, problem.target_ids, threshold)
            torch.testing.assert_close(ours.lower, lower, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(ours.upper, upper, rtol=1e-9, atol=1e-9)


def test_many_rows_and_tiles_and_what_the_exact_columns_are_worth():
    problem = views_problem(1, num_views=1, num_rows=300, width=24, columns=2500, size=3.0).to(torch.float32)
    head = LMHead(problem.head.weight)
    ready = Int8Head.of(head, problem.views[0])
    exact = reference.linear_logprobs(problem.views[0], head, problem.target_ids).logprobs
    width = {}
    for threshold in THRESHOLDS:
        lower, upper = logprob_bounds(problem.views[0], ready, problem.target_ids, threshold)
        assert bool(((lower <= exact + 1e-5) & (upper >= exact - 1e-5)).all())
        width[threshold] = float((upper - lower).median())
    assert width[1e-3] < 0.1 * width[1.0]
    lower, upper = logprob_bounds(problem.views[0], ready, problem.target_ids, 1e-9)
    torch.testing.assert_close((lower + upper) / 2, exact, rtol=1e-5, atol=1e-4)


def test_a_head_is_prepared_once_and_again_when_its_weight_changes(monkeypatch):
    made = []
    monkeypatch.setattr(int8_head, "_ready", [])
    monkeypatch.setattr(Int8Head, "of", classmethod(lambda cls, *given, of=Int8Head.of: made.append(1) or of(*given)))
    problem = views_problem(3, num_views=1, width=8, columns=30)
    weight = problem.head.weight.clone()
    for _ in range(2):
        ready_head(LMHead(weight), problem.others)
    assert len(made) == 1
    with torch.no_grad():
        weight[7, 3] += 1e-3
    found = ready_head(LMHead(weight), problem.others)
    assert len(made) == 2
    assert found.head.weight is not problem.head.weight
    ready_head(LMHead(weight, softcap=3.0), problem.others)
    assert len(made) == 3


def test_rows_of_int8():
    rows = int8_rows(torch.tensor([[0.0, 0.0], [127.0, -3.4], [-1.27, 0.006]], dtype=torch.float64))
    torch.testing.assert_close(rows, torch.tensor([[0.0, 0.0], [127.0, -3.0], [-1.27, 0.01]], dtype=torch.float64))


def test_no_number_is_no_bound():
    problem = views_problem(5, num_views=1, num_rows=3, width=8, columns=30)
    ready = Int8Head.of(problem.head, problem.others)
    hidden = problem.views[0].clone()
    hidden[1, 2] = torch.nan
    hidden[2, 0] = torch.inf
    for values in logprob_bounds(hidden, ready, problem.target_ids):
        assert values.isnan().tolist() == [False, True, True]
