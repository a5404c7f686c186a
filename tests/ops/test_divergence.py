"""`linear_divergence`: values, and gradients under arbitrary upstream weights (where others are silently wrong)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support import assert_accurate, make_problem, natives, problems
from unisd_kernels import LMHead, linear_divergence

SMALL = 8192
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def run(problem, upstream, beta, temperature, impl, **options):
    divergence = linear_divergence(
        problem.student_hidden,
        problem.student_head,
        problem.teacher_hidden,
        problem.teacher_head,
        beta=beta,
        temperature=temperature,
        impl=impl,
        **options,
    )
    gradients = torch.autograd.grad((divergence * upstream.to(divergence)).sum(), problem.leaves)
    return divergence.detach(), gradients


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@given(data=st.data())
def test_values_and_weighted_gradients(dtype, data):
    exact_problem = data.draw(problems(dtype=dtype, num_auxiliary=0, negative=False, token_weights=False))
    beta, temperature = data.draw(st.sampled_from(BETAS)), data.draw(st.sampled_from([1.0, 0.7, 3.0]))
    upstream = torch.randn(exact_problem.student_hidden.shape[0], dtype=torch.float64)
    exact = run(exact_problem, upstream, beta, temperature, "reference")
    problem = exact_problem.to(dtype)
    ours = run(problem, upstream, beta, temperature, None, workspace_bytes=SMALL)
    native = natives(lambda: run(problem, upstream, beta, temperature, "reference"))
    assert_accurate("divergence", ours[0], exact[0], [values for values, _ in native])
    for position, (mine, right) in enumerate(zip(ours[1], exact[1], strict=True)):
        assert_accurate(f"gradient {position}", mine, right, [gradients[position] for _, gradients in native])


@pytest.mark.parametrize("frozen_head", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_clip_weights_and_masks_of_the_user(beta, frozen_head):
    """Anything a user does with the per-token result: mask, weight, clip, normalize."""
    problem = make_problem(frozen_head=frozen_head, lengths=(4, 5))
    gradients = []
    for impl in ("reference", None):
        d = linear_divergence(
            problem.student_hidden,
            problem.student_head,
            problem.teacher_hidden,
            problem.teacher_head,
            beta=beta,
            impl=impl,
        )
        mask = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1, 0], dtype=torch.float64)
        weights = mask * torch.linspace(-2, 3, 9, dtype=torch.float64)
        loss = (d.clamp(max=float(d.detach().median())) * weights).sum() / mask.sum() + d.square().mean()
        gradients.append(torch.autograd.grad(loss, problem.leaves))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradient_accumulation_equals_the_big_batch():
    problem = make_problem(lengths=(9,), frozen_head=False).to(torch.float32)

    def divergence(rows):
        return linear_divergence(
            problem.student_hidden[rows], problem.student_head, problem.teacher_hidden[rows], problem.teacher_head
        )

    (divergence(slice(0, 9)).sum() / 9).backward()
    whole = [leaf.grad.clone() for leaf in problem.leaves]
    for leaf in problem.leaves:
        leaf.grad = None
    for rows in (slice(0, 2), slice(2, 7), slice(7, 9)):
        (divergence(rows).sum() / 9).backward()
    for leaf, expected in zip(problem.leaves, whole, strict=True):
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("beta", BETAS)
def test_identical_models_have_no_divergence(beta):
    problem = make_problem(shared_head=True, logit_std=8.0).to(torch.float32)
    hidden = problem.student_hidden
    d = linear_divergence(hidden, problem.student_head, hidden.detach(), problem.student_head.detach(), beta=beta)
    gradients = torch.autograd.grad(d.sum(), problem.leaves)
    assert 0 <= float(d.min()) <= float(d.max()) < 1e-6
    for gradient in gradients:
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("beta", BETAS)
def test_small_divergences_keep_their_digits(beta):
    """Near D = 1e-5 the dense float32 formula is off by percents: the rounding of its log-sum-exps is first order."""
    weight = torch.randn(20000, 32) * 3 / 32**0.5
    hidden = torch.randn(16, 32)
    other = hidden + 3e-3 * torch.randn(16, 32)

    def divergence(dtype, impl):
        head = LMHead(weight.to(dtype))
        return linear_divergence(hidden.to(dtype), head, other.to(dtype), head, beta=beta, impl=impl).double()

    exact = divergence(torch.float64, "reference")
    assert 1e-6 < float(exact.median()) < 1e-4
    ours = ((divergence(torch.float32, None) - exact).abs() / exact).median()
    dense = ((divergence(torch.float32, "reference") - exact).abs() / exact).median()
    # A logit of ten is rounded by 1e-6 whoever multiplies; student and teacher differ by some 5e-3 in each.
    assert ours < 1e-3
    assert ours < 0.1 * dense


@pytest.mark.parametrize("beta", BETAS)
def test_extreme_logits_are_finite(beta):
    problem = make_problem(frozen_head=False).to(torch.float32)
    with torch.no_grad():
        problem.student_head.weight[3] = 1e4
        problem.student_head.weight[5] = -1e4
        problem.teacher_head.weight[5] = 1e4
    d = linear_divergence(
        problem.student_hidden, problem.student_head, problem.teacher_hidden, problem.teacher_head, beta=beta
    )
    gradients = torch.autograd.grad(d.sum(), problem.leaves)
    assert d.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert d.max() > 0.3  # the models really disagree


def test_different_widths_scales_and_caps():
    problem = make_problem(hidden_size=6, softcap=5.0)
    other = make_problem(hidden_size=4, logit_scale=0.5, bias=True, seed=3)
    d = [
        linear_divergence(
            problem.student_hidden, problem.student_head, other.teacher_hidden, other.teacher_head, impl=impl
        )
        for impl in ("reference", None)
    ]
    torch.testing.assert_close(*d)


@pytest.mark.parametrize("trainable", ["weight", "bias"])
def test_only_what_requires_a_gradient_gets_one(trainable):
    problem = make_problem(bias=True)
    head = problem.student_head
    head.weight.requires_grad_(trainable == "weight")
    head.bias.requires_grad_(trainable == "bias")
    hidden = problem.student_hidden.detach()
    gradients = []
    for impl in ("reference", None):
        d = linear_divergence(hidden, head, problem.teacher_hidden, problem.teacher_head, impl=impl)
        gradients.append(torch.autograd.grad((d * torch.arange(8.0)).sum(), getattr(head, trainable))[0])
    torch.testing.assert_close(*gradients)


def test_backward_twice():
    problem = make_problem(frozen_head=True)
    d = linear_divergence(problem.student_hidden, problem.student_head, problem.teacher_hidden, problem.teacher_head)
    loss = d.square().sum()
    first = torch.autograd.grad(loss, problem.student_hidden, retain_graph=True)[0]
    second = torch.autograd.grad(loss, problem.student_hidden)[0]
    torch.testing.assert_close(first, second)


def test_autocast_computes_in_its_dtype():
    problem = make_problem(frozen_head=False).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        d = linear_divergence(
            problem.student_hidden, problem.student_head, problem.teacher_hidden, problem.teacher_head
        )
        gradients = torch.autograd.grad(d.sum(), problem.leaves)
    narrow = problem.to(torch.bfloat16)
    expected = linear_divergence(narrow.student_hidden, narrow.student_head, narrow.teacher_hidden, narrow.teacher_head)
    assert d.dtype == torch.float32
    torch.testing.assert_close(d, expected)
    assert [gradient.dtype for gradient in gradients] == [torch.float32, torch.float32]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gradcheck_of_the_tiled_path(beta):
    problem = make_problem(lengths=(4,), bias=True, softcap=4.0, vocab_size=9, hidden_size=3)

    def function(hidden, weight, bias):
        return linear_divergence(
            hidden,
            LMHead(weight, bias, 1.0, 4.0),
            problem.teacher_hidden,
            problem.teacher_head,
            beta=beta,
            impl=None,
            workspace_bytes=300,
        )

    head = problem.student_head
    assert torch.autograd.gradcheck(function, (problem.student_hidden, head.weight, head.bias))
    assert torch.autograd.gradcheck(
        lambda hidden: function(hidden, head.weight.detach(), head.bias.detach()), (problem.student_hidden,)
    )
