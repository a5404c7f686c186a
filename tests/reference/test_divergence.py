"""The dense divergences: definition, properties and closed-form gradients."""

from __future__ import annotations

import pytest
import torch

from tests.support import make_problem
from unisd_kernels import LMHead, reference

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def log_probs(num_rows=6, num_columns=11, scale=2.0):
    return torch.log_softmax(torch.randn(num_rows, num_columns, dtype=torch.float64) * scale, -1)


def definition(p_s, p_t, beta):
    """In probabilities, with explicit logarithms."""

    def kl(p, q):
        return (p * (p.log() - q.log())).sum(-1)

    if beta == 0.0:
        return kl(p_t, p_s)
    if beta == 1.0:
        return kl(p_s, p_t)
    m = (1 - beta) * p_s + beta * p_t
    return beta * kl(p_t, m) + (1 - beta) * kl(p_s, m)


@pytest.mark.parametrize("beta", BETAS)
def test_matches_the_definition(beta):
    s, t = log_probs(), log_probs()
    torch.testing.assert_close(
        reference.divergence_from_log_probs(s, t, beta), definition(s.exp(), t.exp(), beta), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("beta", BETAS)
def test_zero_only_where_equal(beta):
    s, t = log_probs(), log_probs()
    assert reference.divergence_from_log_probs(s, s, beta).abs().max() < 1e-14
    assert reference.divergence_from_log_probs(s, t, beta).min() > 1e-3


def test_jsd_is_symmetric_and_bounded():
    s, t = log_probs(scale=20.0), log_probs(scale=20.0)
    there = reference.divergence_from_log_probs(s, t, 0.5)
    back = reference.divergence_from_log_probs(t, s, 0.5)
    torch.testing.assert_close(there, back)
    assert there.max() <= torch.log(torch.tensor(2.0, dtype=torch.float64)) + 1e-12


@pytest.mark.parametrize("beta", BETAS)
def test_closed_form_gradient(beta):
    """The gradient in closed form with respect to the student's logits."""
    z_s = (torch.randn(6, 11, dtype=torch.float64) * 2).requires_grad_()
    log_t = log_probs()
    log_s = torch.log_softmax(z_s, -1)
    divergence = reference.divergence_from_log_probs(log_s, log_t, beta)
    (gradient,) = torch.autograd.grad(divergence.sum(), z_s)
    log_s, d = log_s.detach(), divergence.detach().unsqueeze(-1)
    p_s, p_t = log_s.exp(), log_t.exp()
    if beta == 0.0:
        expected = p_s - p_t
    elif beta == 1.0:
        expected = p_s * (log_s - log_t - d)
    else:
        log_m = ((1 - beta) * p_s + beta * p_t).log()
        kl_s = (p_s * (log_s - log_m)).sum(-1, keepdim=True)
        expected = (1 - beta) * p_s * (log_s - log_m - kl_s)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_gradcheck(beta):
    problem = make_problem(lengths=(3,), bias=True, vocab_size=7, hidden_size=3, logit_scale=1.2, softcap=4.0)

    def function(hidden, weight, bias):
        head = LMHead(weight, bias, 1.2, 4.0)
        return reference.linear_divergence(
            hidden, head, problem.teacher_hidden, problem.teacher_head, beta, temperature=0.7
        )

    head = problem.student_head
    assert torch.autograd.gradcheck(function, (problem.student_hidden, head.weight, head.bias))


def test_no_gradient_reaches_the_teacher():
    problem = make_problem()
    teacher = problem.teacher_hidden.requires_grad_()
    problem.teacher_head.weight.requires_grad_()
    loss = reference.linear_divergence(problem.student_hidden, problem.student_head, teacher, problem.teacher_head)
    loss.sum().backward()
    assert teacher.grad is None
    assert problem.teacher_head.weight.grad is None


@pytest.mark.parametrize("beta", BETAS)
def test_finite_where_both_probabilities_underflow(beta):
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    t = torch.log_softmax(torch.tensor([[1e4, -1e4, 5.0], [-1e4, 0.0, 1e4]]), -1)
    divergence = reference.divergence_from_log_probs(torch.log_softmax(z, -1), t, beta)
    (gradient,) = torch.autograd.grad(divergence.sum(), z)
    assert divergence.isfinite().all()
    assert gradient.isfinite().all()
