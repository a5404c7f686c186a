"""Teachers, ids and weights made under `torch.inference_mode()` train like any others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support import make_problem
from unisd_kernels import LMHead, linear_divergence, linear_logprobs, unisd_loss


def loss(problem, impl):
    return unisd_loss(**problem.arguments(), feature_weight=0.1, clip_quantile=0.6, impl=impl).loss


def divergence(problem, impl):
    student, teacher = (problem.student_hidden, problem.student_head), (problem.teacher_hidden, problem.teacher_head)
    return linear_divergence(*student, *teacher, beta=0.3, impl=impl).square().sum()


def logprobs(problem, impl):
    return linear_logprobs(problem.student_hidden, problem.student_head, problem.target_ids, impl=impl).logprobs.sum()


def entropy(problem, impl):
    scores = linear_logprobs(
        problem.student_hidden, problem.student_head, problem.target_ids, return_entropy=True, impl=impl
    )
    assert scores.entropy is not None
    return scores.entropy.sum() + scores.logsumexp.sum()


def inferred(problem):
    """The same problem, with every tensor that needs no gradient an inference tensor."""

    def move(tensor):
        with torch.inference_mode():
            return tensor.clone()

    def kept(tensor, before):
        return before if before is None or before.requires_grad else tensor

    with torch.inference_mode():
        moved = problem.map(move)
    before, after = problem.student_head, moved.student_head
    moved = replace(
        moved,
        student_hidden=kept(moved.student_hidden, problem.student_hidden),
        student_head=LMHead(kept(after.weight, before.weight), kept(after.bias, before.bias)),
    )
    assert moved.teacher_hidden.is_inference()
    assert moved.target_ids.is_inference()
    return moved


@pytest.mark.parametrize("impl", ["native", "torch", "reference"])
@pytest.mark.parametrize("trained", ["hidden", "head", "both"])
@pytest.mark.parametrize("function", [loss, divergence, logprobs, entropy])
def test_the_same_gradients(function, trained, impl):
    problem = make_problem(bias=True, token_weights=True, frozen_head=trained == "hidden").to(torch.float32)
    problem = replace(problem, num_items=torch.tensor(5))
    problem.student_hidden.requires_grad_(trained != "head")
    expected = torch.autograd.grad(function(problem, impl), problem.leaves)
    assert len(expected) == {"hidden": 1, "head": 2, "both": 3}[trained]
    ours = torch.autograd.grad(function(inferred(problem), impl), problem.leaves)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        assert not a.is_inference()


@pytest.mark.parametrize("impl", ["native", "torch"])
def test_kept_for_a_second_backward_and_no_longer(impl):
    problem = make_problem(frozen_head=False).to(torch.float32)
    moved = inferred(problem)
    value = divergence(moved, impl)
    first = torch.autograd.grad(value, moved.leaves, retain_graph=True)
    second = torch.autograd.grad(value, moved.leaves)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, moved.leaves)


def test_under_autocast_and_in_a_compiled_graph():
    torch.compiler.reset()
    problem = replace(make_problem(frozen_head=True).to(torch.float32), num_items=torch.tensor(5))
    moved = inferred(problem)
    compiled = torch.compile(
        lambda hidden: unisd_loss(**{**moved.arguments(), "student_hidden": hidden}).loss, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(problem.student_hidden), unisd_loss(**problem.arguments()).loss)
    torch.compiler.reset()
    with torch.autocast("cpu", torch.bfloat16):
        ours, expected = (divergence(each, "torch") for each in (moved, problem))
    torch.testing.assert_close(ours, expected)
    ours.backward()
    assert problem.student_hidden.grad.isfinite().all()
