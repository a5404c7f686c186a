"""`linear_logprobs` of every tiled implementation against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support import assert_accurate, make_problem, natives, problems
from unisd_kernels import linear_logprobs
from unisd_kernels.backends import engine
from unisd_kernels.backends.projection import Projection
from unisd_kernels.backends.torch import TorchBackend
from unisd_kernels.backends.transform import LogitTransform

SMALL = 4096  # bytes: a handful of rows a chunk, several columns tiles


def run(problem, upstream, impl, temperature, return_entropy, **options):
    """Statistics, and gradients of their combination by `upstream` [3, N]."""
    result = linear_logprobs(
        problem.student_hidden,
        problem.student_head,
        problem.target_ids,
        temperature=temperature,
        return_entropy=return_entropy,
        impl=impl,
        **options,
    )
    parts = [part for part in result if part is not None]
    total = sum((part * weight.to(part)).sum() for part, weight in zip(parts, upstream, strict=False))
    return [part.detach() for part in parts], torch.autograd.grad(total, problem.leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@given(data=st.data())
def test_values_and_gradients(dtype, data):
    exact_problem = data.draw(problems(dtype=dtype))
    temperature = data.draw(st.sampled_from([1.0, 0.7, 3.0]))
    return_entropy = data.draw(st.booleans())
    upstream = torch.randn(3, exact_problem.student_hidden.shape[0], dtype=torch.float64)
    arguments = (upstream, "reference", temperature, return_entropy)
    exact = run(exact_problem, *arguments)
    problem = exact_problem.to(dtype)
    ours = run(problem, upstream, None, temperature, return_entropy, workspace_bytes=SMALL)
    native = natives(lambda: run(problem, *arguments))
    for which, kind in enumerate(("value", "gradient")):
        for position, (mine, right) in enumerate(zip(ours[which], exact[which], strict=True)):
            assert_accurate(f"{kind} {position}", mine, right, [each[which][position] for each in native])


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("frozen_head", [True, False])
def test_each_statistic_alone_is_differentiable(part, frozen_head):
    problem = make_problem(bias=True, softcap=4.0, frozen_head=frozen_head)
    gradients = []
    for impl in ("reference", None):
        result = linear_logprobs(
            problem.student_hidden, problem.student_head, problem.target_ids, return_entropy=part == 2, impl=impl
        )
        gradients.append(torch.autograd.grad(result[part].sum(), problem.leaves))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_no_grad_and_non_contiguous():
    problem = make_problem(frozen_head=True).to(torch.float32)
    wide = torch.randn(problem.student_hidden.shape[0], 12)
    wide[:, ::2] = problem.student_hidden.detach()
    with torch.no_grad():
        result = linear_logprobs(wide[:, ::2], problem.student_head, problem.target_ids)
    expected = linear_logprobs(problem.student_hidden, problem.student_head, problem.target_ids, impl="reference")
    assert not result.logprobs.requires_grad
    torch.testing.assert_close(result.logprobs, expected.logprobs.detach())


def test_int32_targets():
    problem = make_problem()
    narrow = linear_logprobs(problem.student_hidden, problem.student_head, problem.target_ids.int())
    torch.testing.assert_close(
        narrow.logprobs, linear_logprobs(problem.student_hidden, problem.student_head, problem.target_ids).logprobs
    )


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits(size):
    problem = make_problem(frozen_head=True).to(torch.float32)
    problem.student_head.weight[3] = size
    problem.student_head.weight[7] = -size
    result = linear_logprobs(
        problem.student_hidden, problem.student_head, problem.target_ids, return_entropy=True, workspace_bytes=SMALL
    )
    exact = linear_logprobs(
        problem.student_hidden.double(),
        problem.to(torch.float64).student_head,
        problem.target_ids,
        return_entropy=True,
        impl="reference",
    )
    for ours, right in zip(result, exact, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-4)


def test_gradcheck_of_the_tiled_path():
    problem = make_problem(bias=True, softcap=4.0, vocab_size=9, hidden_size=3)
    head = problem.student_head

    def function(hidden, weight, bias):
        return tuple(
            linear_logprobs(
                hidden,
                type(head)(weight, bias, 1.0, 4.0),
                problem.target_ids,
                return_entropy=True,
                impl=None,
                workspace_bytes=300,
            )
        )

    assert torch.autograd.gradcheck(function, (problem.student_hidden, head.weight, head.bias))


@pytest.mark.parametrize("impl", ["torch", None])
def test_more_rows_than_are_scored_at_a_time(impl, monkeypatch):
    problem = make_problem(lengths=(20, 0, 21), frozen_head=True)
    arguments = (problem.student_hidden.detach(), problem.student_head, problem.target_ids)
    expected = linear_logprobs(*arguments, return_entropy=True, impl="reference")
    monkeypatch.setattr(engine, "SCORE_ROWS", 8)
    for ours, exact in zip(linear_logprobs(*arguments, return_entropy=True, impl=impl), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)


def test_a_slice_without_a_column_says_nothing_of_its_rows():
    """Nor what lay in its memory."""
    nothing = Projection(torch.randn(5, 4), torch.empty(0, 4), None, LogitTransform(1.0, None, 1.0))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        scores = engine.Engine(TorchBackend(), 1 << 20).score(nothing, torch.zeros(5, dtype=torch.int64), True)
    finally:
        torch.use_deterministic_algorithms(before)
    assert scores.logsumexp.eq(-torch.inf).all()
    assert scores.entropy.eq(0).all()
