"""The difference form: with one head for student and teacher, a small divergence and its gradient keep their digits."""

from __future__ import annotations

import pytest
import torch

from bench.numerics import exact_divergence, noisy, scale_for
from unisd_kernels import LMHead, linear_divergence, reference


@pytest.fixture(scope="module")
def operands():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4000, 64, generator=generator).mul_(3.0 / 8.0).bfloat16()
    return torch.randn(12, 64, generator=generator).bfloat16(), weight


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("target", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_error_of_d_is_at_most_a_thousandth(operands, target, beta):
    hidden, weight = operands
    teacher = noisy(hidden, scale_for(target, hidden, weight))
    exact = exact_divergence(hidden, teacher, weight, beta)
    assert float(exact.mean()) < 2 * target
    head = LMHead(weight)
    ours = linear_divergence(hidden, head, teacher, head, beta=beta, impl="native")
    seen = exact > 0  # a row whose noise rounded away altogether
    assert float(((ours.double() - exact).abs() / exact)[seen].max()) < 1e-3
    assert not ours[~seen].any()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gradient_of_a_small_divergence(operands, beta):
    hidden, weight = operands
    teacher = noisy(hidden, scale_for(1e-5, hidden, weight)).float()
    gradients = []
    for dtype, impl in ((torch.float64, "reference"), (torch.float32, "native"), (torch.float32, "torch")):
        student = hidden.to(dtype).requires_grad_()
        head = LMHead(weight.to(dtype))
        linear_divergence(student, head, teacher.to(dtype), head, beta=beta, impl=impl).sum().backward()
        gradients.append(student.grad.double())
    exact, native, torch_ = gradients
    assert float((native - exact).norm() / exact.norm()) < 1e-4
    assert float((native - exact).norm()) < float((torch_ - exact).norm())


@pytest.mark.parametrize("what", ["bias", "scale", "other_weight", "softcap"])
def test_only_one_and_the_same_linear_head_is_differenced(operands, what):
    """Heads that look alike and are not: the numbers must be those of both heads."""
    hidden, weight = operands[0].float(), operands[1].float()
    teacher = hidden + 0.1 * torch.randn_like(hidden)
    student_head = LMHead(weight, softcap=5.0 if what == "softcap" else None)
    teacher_head = {
        "bias": LMHead(weight, bias=torch.randn(4000)),
        "scale": LMHead(weight, logit_scale=0.5),
        "other_weight": LMHead(weight + 0.01),
        "softcap": LMHead(weight, softcap=5.0),
    }[what]
    ours = linear_divergence(hidden, student_head, teacher, teacher_head, impl="native")
    expected = reference.linear_divergence(
        hidden.double(), wide(student_head), teacher.double(), wide(teacher_head), 0.0
    )
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)


def wide(head):
    bias = None if head.bias is None else head.bias.double()
    return LMHead(head.weight.double(), bias, head.logit_scale, head.softcap)


def test_a_shared_bias_cancels(operands):
    hidden, weight = operands[0].float(), operands[1].float()
    teacher = hidden + 0.1 * torch.randn_like(hidden)
    head = LMHead(weight, bias=torch.randn(4000))
    ours = linear_divergence(hidden, head, teacher, head, beta=0.5, impl="native")
    expected = reference.linear_divergence(hidden.double(), wide(head), teacher.double(), wide(head), 0.5)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-7)
