"""The difference form: with one head for student and teacher, a small divergence and its gradient keep their digits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.studies.numerics import exact_divergence, noisy, scale_for
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
    # Of a row whose noise rounded away altogether D is 0, and ours is; float64's may be 1e-17, where the library's two
    # products sum in two orders.
    moved = (teacher != hidden).any(-1)
    assert float(((ours.double() - exact).abs() / exact)[moved].max()) < 1e-3
    assert not ours[~moved].any()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gradient_of_a_small_divergence(operands, beta):
    hidden, weight = operands
    teacher = noisy(hidden, scale_for(1e-5, hidden, weight)).float()
    gradients = []
    for dtype, impl in ((torch.float64, "reference"), (torch.float32, "native"), (torch.float32, "torch")):
        student = hidden.to(dtype, copy=True).requires_grad_()
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


# Large logits: p_t has to sum to one, whatever the sizes of z_s and z_t - z_s are.


def both_ways(hidden, teacher, head, beta, temperature):
    """D and the gradient with one head for both, with two that only look alike (each is then projected by itself), and
    in float64."""
    results = []
    for student_head, teacher_head in ((head, head), (head, copy_of(head)), (wide(head), wide(head))):
        dtype = student_head.weight.dtype
        student = hidden.to(dtype, copy=True).requires_grad_()
        arguments = student, student_head, teacher.to(dtype), teacher_head
        if dtype == torch.float64:
            divergence = reference.linear_divergence(*arguments, beta, temperature)
        else:
            divergence = linear_divergence(*arguments, beta=beta, temperature=temperature, impl="native")
        divergence.sum().backward()
        results.append((divergence.detach().double(), student.grad.double()))
    return results


def copy_of(head):
    return LMHead(head.weight.clone(), None if head.bias is None else head.bias.clone(), head.logit_scale)


def largest_error(values, exact):
    return float((values - exact).abs().max())


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6])
def test_one_head_is_as_exact_as_two_at_low_temperatures(temperature, beta, with_bias):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(40, 16, generator=generator), torch.randn(40, generator=generator)
    hidden = torch.randn(64, 16, generator=generator)
    teacher = hidden + 0.3 * torch.randn(64, 16, generator=generator)
    one, two, exact = both_ways(hidden, teacher, LMHead(weight, bias if with_bias else None), beta, temperature)
    largest = float(exact[0].max())
    assert largest > 0.3
    # The logits' own rounding is 1e-7 of some 10 / temperature, and D does not always grow with them.
    rounding = 2e-6 * largest if beta == 0.0 else 2e-6 * largest + 2e-7 * min(1.0 / temperature, 1e3) * largest
    assert largest_error(one[0], exact[0]) <= 2 * largest_error(two[0], exact[0]) + rounding
    if beta == 0.0:
        rounding = 3e-6 * float(exact[1].abs().max())
        assert largest_error(one[1], exact[1]) <= 2 * largest_error(two[1], exact[1]) + rounding


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("student_scale", "teacher_scale"), [(300.0, 1.0), (1.0, 300.0), (300.0, 300.0)])
def test_a_teacher_is_exact_beside_a_student_of_larger_logits(student_scale, teacher_scale, with_bias):
    """z_t = z_s + (z_t - z_s) would have the rounding of z_s, 300 times its own. In every third row the two are near:
    rows of both kinds lie in one chunk."""
    generator = torch.Generator().manual_seed(0)
    head = LMHead(
        torch.randn(500, 16, generator=generator), torch.randn(500, generator=generator) if with_bias else None
    )
    hidden = torch.randn(60, 16, generator=generator) * student_scale
    teacher = torch.randn(60, 16, generator=generator) * teacher_scale
    teacher[::3] = hidden[::3] * (1.0 + 1e-4 * torch.randn(20, 16, generator=generator))
    one, two, exact = both_ways(hidden, teacher, head, 0.0, 1.0)
    far = torch.arange(60) % 3 > 0
    relative = ((one[0] - exact[0]).abs() / exact[0])[far].max()
    assert relative <= 2 * float(((two[0] - exact[0]).abs() / exact[0])[far].max()) + 2e-6
    assert largest_error(one[0][~far], exact[0][~far]) <= 2 * largest_error(two[0][~far], exact[0][~far]) + 1e-7
    assert largest_error(one[1], exact[1]) <= 2 * largest_error(two[1], exact[1]) + 3e-6 * float(exact[1].abs().max())


@settings(max_examples=30)
@given(
    size=st.sampled_from([0.1, 1.0, 10.0, 100.0, 1000.0]),
    distance=st.sampled_from([1e-4, 1e-2, 0.3, 3.0, 100.0]),
    temperature=st.sampled_from([2.0, 0.7, 0.1, 1e-3]),
    columns=st.sampled_from([2, 40, 300]),
    beta=st.sampled_from([0.0, 0.5]),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_one_head_is_never_worse_than_two(size, distance, temperature, columns, beta, with_bias, seed):
    """Whatever the sizes of the logits and of their differences: but for one rounding of the largest logit."""
    generator = torch.Generator().manual_seed(seed)
    head = LMHead(torch.randn(columns, 8, generator=generator), torch.randn(columns, generator=generator))
    head = head if with_bias else LMHead(head.weight)
    hidden = torch.randn(12, 8, generator=generator) * size
    teacher = hidden + torch.randn(12, 8, generator=generator) * size * distance
    one, two, exact = both_ways(hidden, teacher, head, beta, temperature)
    logits = float(torch.maximum(hidden.abs().amax(), teacher.abs().amax()) * 10 / temperature)
    rounding = 2.0**-24 * logits
    allowed = 2 * largest_error(two[0], exact[0]) + 3e-6 * float(exact[0].max()) + 1e-7 * min(1.0, logits)
    assert largest_error(one[0], exact[0]) <= allowed + rounding * float(exact[0].max().clamp(max=1.0))
    assert one[0].isfinite().all()
    assert (one[0] >= 0).all()


def test_one_favourite_for_both_at_a_low_temperature_is_no_divergence():
    """p_s = p_t = 1 at one column: D underflows, and is 0 rather than what 1e6 logits are rounded to."""
    weight, hidden = torch.randn(40, 16), torch.randn(64, 16)
    head = LMHead(weight)
    ours = linear_divergence(hidden, head, hidden * 1.01, head, temperature=1e-6, impl="native")
    exact = reference.linear_divergence(hidden.double(), wide(head), hidden.double() * 1.01, wide(head), 0.0, 1e-6)
    same = exact < 1e-30
    assert same.sum() > 50
    assert not ours[same].any()
