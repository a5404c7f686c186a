"""Student and teacher far apart, in every direction: directed values, and a sweep against an oracle."""

from __future__ import annotations

import math
import random

import pytest
import torch

from tests.fuzz.cases import Case
from tests.fuzz.compare import shortfalls
from tests.support import make_problem
from tests.triton.support import DEVICE
from unisd_kernels import LMHead, linear_divergence, linear_logprobs, unisd_loss
from unisd_kernels.backends.triton.launch import interpreting

DESIGNS = ["triton_fused", "triton_chunked"]
BETAS = [0.0, 1.0, 0.5, 0.01, 0.99, 1e-6, 1.0 - 1e-6]


def divergence_and_gradient(student, teacher, weight, dtype, impl, teacher_weight=None, **options):
    """D and dD/dh of rows given in float64, computed in `dtype`."""
    leaf = student.to(DEVICE, dtype).requires_grad_()
    head = LMHead(weight.to(DEVICE, dtype))
    teacher_head = head if teacher_weight is None else LMHead(teacher_weight.to(DEVICE, dtype))
    d = linear_divergence(leaf, head, teacher.to(DEVICE, dtype), teacher_head, impl=impl, **options)
    return d.detach(), torch.autograd.grad(d.sum(), leaf)[0]


@pytest.mark.parametrize("impl", DESIGNS)
@pytest.mark.parametrize("two_heads", [False, True])
def test_forward_divergence_below_one_nat_where_the_reverse_is_large(impl, two_heads):
    """Two tokens: the teacher gives the second one nothing, the student nearly half."""
    teacher_logits = [-1.0, -4.0, -15.0, -25.0, -40.0, -60.0, -90.0, -120.0, -200.0, -2000.0]
    teacher = torch.tensor([[0.0, z] for z in teacher_logits], dtype=torch.float64)
    student = torch.tensor([[0.0, -0.1875]], dtype=torch.float64).expand_as(teacher).clone()
    weight = torch.eye(2, dtype=torch.float64)
    p_s = 1.0 / (1.0 + math.exp(-0.1875))
    expected = []
    for z in teacher_logits:
        p_t = 1.0 / (1.0 + math.exp(z))
        other = math.exp(z) * p_t
        expected.append(
            p_t * (-math.log1p(math.exp(z)) - math.log(p_s))
            + (other and other * (z + math.log(p_t)))
            - other * math.log(1.0 - p_s)
        )
    exact = torch.tensor(expected, dtype=torch.float64)
    for dtype in (torch.float32, torch.float16):
        other_head = weight.clone() if two_heads else None
        d, gradient = divergence_and_gradient(student, teacher, weight, dtype, impl, other_head)
        # A float32 logit of 200 is good to 1e-5.
        assert ((d.double().cpu() - exact).abs() <= 4e-7 * (1.0 - teacher.min(-1).values) + 1e-6).all()
        p_t = torch.softmax(teacher, -1)[:, 0]
        torch.testing.assert_close(gradient.double().cpu()[:, 0], p_s - p_t, rtol=1e-3, atol=1e-6)


def test_such_a_token_is_not_clipped():
    problem = make_problem(
        lengths=(1,), hidden_size=2, vocab_size=2, num_auxiliary=0, negative=False, frozen_head=True, shared_head=True
    )
    problem.student_head.weight.copy_(torch.eye(2))
    problem.student_hidden.data.copy_(torch.tensor([[0.0, -0.2]]))
    problem.teacher_hidden.copy_(torch.tensor([[0.0, -60.0]]))
    problem = problem.to(torch.float32).map(lambda tensor: tensor.to(DEVICE))
    result = unisd_loss(**problem.arguments(), impl="triton", clip_cap=10.0, contrastive_weight=0.0)
    assert float(result.loss.detach()) == pytest.approx(0.598139, abs=2e-5)
    gradient = torch.autograd.grad(result.loss, problem.student_hidden)[0]
    assert float(gradient[0, 1]) == pytest.approx(1.0 / (1.0 + math.exp(0.2)), rel=1e-4)


@pytest.mark.parametrize("impl", DESIGNS)
@pytest.mark.parametrize(("student_size", "teacher_size"), [(-200.0, 250.0), (-20.0, 25.0), (-2.0, 100.0)])
def test_reverse_divergence_weighs_the_teacher_by_the_student(impl, student_size, teacher_size):
    weight = torch.zeros(40, 16, dtype=torch.float64)
    weight[:, 0] = torch.linspace(-1.0, 1.0, 40, dtype=torch.float64).half().double()
    student, teacher = torch.zeros(2, 1, 16, dtype=torch.float64)
    student[0, 0], teacher[0, 0] = student_size, teacher_size
    options = {"beta": 1.0, "temperature": 0.5}
    exact, exact_gradient = divergence_and_gradient(student, teacher, weight, torch.float64, "reference", **options)
    d, gradient = divergence_and_gradient(student, teacher, weight, torch.float16, impl, **options)
    torch.testing.assert_close(d.double(), exact, rtol=2e-6, atol=0.0)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=6e-3, atol=1e-4)


@pytest.mark.parametrize("impl", DESIGNS)
@pytest.mark.parametrize("two_heads", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_teacher_of_small_logits_beside_a_student_of_large_ones(impl, two_heads, beta):
    """log p_s and log p_t - log p_s are some 3000 each, where float32 has steps of 2e-4; p_t is their sum's."""
    weight = torch.linspace(-30.0, 30.0, 131, dtype=torch.float64).float().double()[:, None]
    student = torch.tensor([[-100.25], [87.5]], dtype=torch.float64)
    teacher = torch.tensor([[-0.001], [0.0005]], dtype=torch.float64).float().double()
    other_head = weight.clone() if two_heads else None
    exact, exact_gradient = divergence_and_gradient(student, teacher, weight, torch.float64, "reference", beta=beta)
    d, gradient = divergence_and_gradient(student, teacher, weight, torch.float32, impl, other_head, beta=beta)
    # In a mixture log p_t - log p_s of the student's one token is off by half such a step, which its p_t, .008, weighs.
    torch.testing.assert_close(d.double().cpu(), exact.cpu(), rtol=5e-6 if beta else 1e-6, atol=0.0)
    # There log(m / p_s) + KL(p_s || m) of that token, times a weight of 30, is all rounding.
    atol = 1e-5 if beta else 0.0
    torch.testing.assert_close(gradient.double().cpu(), exact_gradient.cpu(), rtol=2e-6, atol=atol)


@pytest.mark.parametrize("impl", DESIGNS)
def test_forward_divergence_of_a_teacher_of_large_logits_keeps_its_digits(impl):
    """One token has the teacher's probability and a few nats of the student's: E_t[delta] and c are 500, D is 5."""
    weight = torch.linspace(-2.5, 2.5, 131, dtype=torch.float64).half().double()[:, None]
    student = torch.tensor([[1.92], [-0.7], [1.0]], dtype=torch.float64).half().double()
    teacher = torch.tensor([[223.6], [300.0], [-900.0]], dtype=torch.float64).half().double()
    exact, _ = divergence_and_gradient(student, teacher, weight, torch.float64, "reference")
    d, _ = divergence_and_gradient(student, teacher, weight, torch.float16, impl)
    torch.testing.assert_close(d.double(), exact, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("impl", DESIGNS)
def test_slope_of_a_soft_cap_at_saturation(impl, beta):
    """What 16 bits keep of a logit far below the block's largest gives 1 - tanh^2 to their precision, at both ends."""
    weight = torch.eye(12, dtype=torch.float64)
    student = torch.tensor([[-30.0, -9.0, -8.0, -5.0, -2.0, 0.0, 0.5, 2.0, 5.0, 8.0, 9.0, 30.0]], dtype=torch.float64)
    teacher = -student
    results = []
    for dtype, name in ((torch.float64, "reference"), (torch.float16, impl)):
        leaf = student.to(DEVICE, dtype).requires_grad_()
        head = LMHead(weight.to(DEVICE, dtype), softcap=2.0)
        d = linear_divergence(
            leaf, head, teacher.to(DEVICE, dtype), LMHead(head.weight, softcap=2.0), beta=beta, impl=name
        )
        results.append((d.detach().double(), torch.autograd.grad(d.sum(), leaf)[0].double()))
    (exact, exact_gradient), (d, gradient) = results
    torch.testing.assert_close(d, exact, rtol=2e-6, atol=0.0)
    torch.testing.assert_close(gradient, exact_gradient, rtol=2.0**-8, atol=2.0**-24)


@pytest.mark.parametrize("beta", [1e-6, 1.0 - 1e-6])
def test_mixture_with_nearly_all_weight_on_one_side(beta):
    """Twelve columns from -40 to 40 nats apart."""
    weight = torch.eye(12, dtype=torch.float64)
    student = torch.linspace(-2.0, 2.0, 12, dtype=torch.float64).float().double()[None]
    teacher = torch.stack([student[0].flip(0), 10.0 * student[0].flip(0), student[0] + 1e-2 * student[0].square()])
    teacher, student = teacher.float().double(), student.expand(3, 12).clone()
    exact, exact_gradient = divergence_and_gradient(student, teacher, weight, torch.float64, "reference", beta=beta)
    d, gradient = divergence_and_gradient(student, teacher, weight, torch.float32, "triton", beta=beta)
    largest = exact_gradient.abs().amax(-1, keepdim=True)
    assert ((d - exact).abs() <= 3e-4 * exact).all()
    assert ((gradient - exact_gradient).abs() <= 3e-4 * largest).all()


@pytest.mark.skipif(not interpreting(), reason="only the interpreter's products of bfloat16 are wrong")
@pytest.mark.parametrize("impl", ["triton", *DESIGNS])
@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_refused_under_the_interpreter(impl, frozen_head, autocast):
    wide = make_problem(frozen_head=frozen_head).to(torch.float32)
    problem = wide if autocast else wide.to(torch.bfloat16)
    rows = (problem.student_hidden, problem.student_head)
    teacher = (problem.teacher_hidden, problem.teacher_head)
    calls = [
        lambda: unisd_loss(**problem.arguments(), impl=impl),
        lambda: linear_divergence(*rows, *teacher, impl=impl),
        lambda: linear_logprobs(*rows, problem.target_ids, impl=impl),
        lambda: linear_logprobs(*teacher, problem.target_ids, impl=impl),
        # A teacher of another dtype than the student's.
        lambda: linear_divergence(wide.student_hidden, wide.student_head, *teacher, impl=impl),
    ]
    message = r"wrong products of torch\.bfloat16; use torch\.float32 or .*impl='torch'"
    for call in calls:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(TypeError, match=message):
            call()


def configuration(seed: int):
    """A random problem whose probabilities are anything from equal to nothing in common."""
    draw = random.Random(seed)
    vocab_size, width = draw.choice([2, 5, 40, 67, 131]), draw.choice([1, 4, 16])
    dtype = draw.choice([torch.float32, torch.float16])
    softcap = draw.choice([None, None, None, 5.0, 30.0])
    problem = make_problem(
        lengths=(5,),
        hidden_size=width,
        vocab_size=vocab_size,
        num_auxiliary=0,
        negative=False,
        bias=draw.random() < 0.3,
        logit_scale=draw.choice([1.0, 1.0, -0.5]),
        softcap=softcap,
        frozen_head=draw.random() < 0.7,
        shared_head=draw.random() < 0.6,
        logit_std=1.0,
        dtype=dtype,
        seed=seed,
    )
    student, teacher = problem.student_hidden.data, problem.teacher_hidden
    scales = [1e-3, 0.1, 1.0, 5.0, 30.0, 100.0, 300.0]
    for row in range(5):
        student[row] *= draw.choice(scales)
        kind = draw.choice(["near", "scaled", "opposite", "other", "one-hot"])
        if kind == "near":
            teacher[row] = student[row] * (1.0 + draw.choice([0.0, 2.0**-9, 2.0**-6, -(2.0**-4)]))
        elif kind == "scaled":
            teacher[row] = student[row] * draw.choice([0.0, 0.1, 3.0])
        elif kind == "opposite":
            teacher[row] = -student[row] * draw.choice([0.1, 1.0, 1.25])
        elif kind == "other":
            teacher[row] *= draw.choice(scales)
        else:
            # Most of the teacher's probability on one token.
            column = draw.randrange(vocab_size)
            weight = problem.teacher_head.weight.detach()[column]
            teacher[row] = weight / weight.square().sum().clamp(min=1e-3) * draw.choice([10.0, 80.0, 200.0])
    for tensor in (student, teacher):
        tensor.copy_(tensor.clamp(-2000.0, 2000.0).to(dtype).double())
    options = {"temperature": draw.choice([0.1, 0.5, 0.7, 1.0, 2.0])}
    return problem, dtype, options


def check(seed: int, betas) -> None:
    """Against the fuzz's oracle, whose bounds follow from the roundings of the products: a sum of terms larger than
    itself is off by their share and not by its own."""
    problem, dtype, options = configuration(seed)
    narrow = problem.to(dtype)
    leaves = {"hidden": narrow.student_hidden, "weight": narrow.student_head.weight, "bias": narrow.student_head.bias}
    missed = []
    for beta in betas:
        case = Case(
            seed=seed,
            operation="divergence",
            dtype=dtype,
            student=narrow.student_hidden,
            student_head=narrow.student_head,
            teacher=narrow.teacher_hidden,
            teacher_head=narrow.teacher_head,
            ids=narrow.target_ids,
            cu=narrow.cu_seqlens,
            beta=beta,
            workspace=None,
            upstream=[torch.linspace(0.5, 1.5, 5, dtype=torch.float64)],
            wanted=[name for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad],
            **options,
        )
        for impl in DESIGNS:
            missed += [f"beta {beta}, {impl}: {each}" for each in shortfalls(case, impl)]
    assert not missed, f"seed {seed}\n" + "\n".join(missed)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the cases are made for the interpreter; tests/fuzz has others")
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_anything_apart(seed):
    check(seed, [0.0, 1.0, BETAS[2 + seed % 5]])


# What the sweep found: p_t lost beside large log p_s; E_t[delta] - c cancelling; a mixture of both; tokens out of reach
# that weigh less than the rounding of a large log-sum-exp; columns that are not there in a block that is far.
@pytest.mark.skipif(DEVICE.type == "cuda", reason="the cases are made for the interpreter; tests/fuzz has others")
@pytest.mark.parametrize(("seed", "beta"), [(194, 0.0), (122, 0.0), (248, 0.5), (293, 0.0), (316, 0.0), (15, 0.5)])
def test_found_apart(seed, beta):
    check(seed, [beta])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the cases are made for the interpreter; tests/fuzz has others")
@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(100, 350))
def test_everything_apart(seed):
    check(seed, BETAS)
