"""No operation lets a gradient penalty vanish: a backward that is asked for a graph raises."""

from __future__ import annotations

import pytest
import torch

from tests.support import make_problem
from unisd_kernels import linear_divergence, linear_logprobs, unisd_loss


def loss(problem, hidden, **options):
    return unisd_loss(**{**problem.arguments(), "student_hidden": hidden}, **options).loss


def divergence(problem, hidden, **options):
    teacher = (problem.teacher_hidden, problem.teacher_head)
    return linear_divergence(hidden, problem.student_head, *teacher, **options).sum()


def logprobs(problem, hidden, **options):
    return linear_logprobs(hidden, problem.student_head, problem.target_ids, **options).logprobs.sum()


def entropy(problem, hidden, **options):
    scores = linear_logprobs(hidden, problem.student_head, problem.target_ids, return_entropy=True, **options)
    assert scores.entropy is not None
    return scores.entropy.sum()


def penalized(function, problem, **options):
    """The gradient of `hidden**2 + |d function / d hidden|^2`, which a user would take for a penalty."""
    hidden = problem.student_hidden
    (gradient,) = torch.autograd.grad(function(problem, hidden, **options), hidden, create_graph=True)
    return torch.autograd.grad(hidden.square().sum() + gradient.square().sum(), hidden)[0]


@pytest.mark.parametrize("impl", ["native", "torch"])
@pytest.mark.parametrize("frozen_head", [True, False])
@pytest.mark.parametrize("function", [loss, divergence, logprobs, entropy])
def test_a_gradient_penalty_raises(function, frozen_head, impl):
    problem = make_problem(frozen_head=frozen_head).to(torch.float32)
    with pytest.raises(RuntimeError, match=r"double backward is not supported.*create_graph=True.*impl='reference'"):
        penalized(function, problem, impl=impl)
    # Nothing is spent: an ordinary backward still works.
    function(problem, problem.student_hidden, impl=impl).backward()
    assert problem.student_hidden.grad.abs().max() > 0


@pytest.mark.parametrize("function", [loss, divergence, logprobs])
def test_the_reference_has_it(function):
    problem = make_problem(frozen_head=True)
    ours = penalized(function, problem, impl="reference")
    assert (ours - 2 * problem.student_hidden.detach()).abs().max() > 1e-3

    def penalty(hidden):
        hidden = hidden.requires_grad_()
        gradient = torch.autograd.grad(function(problem, hidden, impl="reference"), hidden)[0]
        return float((hidden.square().sum() + gradient.square().sum()).detach())

    step = torch.zeros_like(problem.student_hidden)
    step[1, 2] = 1e-5
    hidden = problem.student_hidden.detach()
    difference = (penalty(hidden + step) - penalty(hidden - step)) / 2e-5
    assert float(ours[1, 2]) == pytest.approx(difference, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_in_a_compiled_graph(backend):
    """With AOTAutograd it is PyTorch that refuses, in the second backward; 2.10 does not."""
    if backend == "aot_eager" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        pytest.skip("this torch drops the second derivative of a compiled graph without a word")
    torch.compiler.reset()
    problem = make_problem(frozen_head=True).to(torch.float32)
    hidden = problem.student_hidden
    compiled = torch.compile(lambda given: loss(problem, given), fullgraph=True, backend=backend)

    def penalty():
        (gradient,) = torch.autograd.grad(compiled(hidden), hidden, create_graph=True)
        (hidden.square().sum() + gradient.square().sum()).backward()

    with pytest.raises(RuntimeError, match="double backward"):
        penalty()
    torch.compiler.reset()
