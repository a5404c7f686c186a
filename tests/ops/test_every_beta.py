"""The divergence at any beta in [0, 1], also where one share of the mixture is next to nothing, against arithmetic with
many digits as that takes."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch

from unisd_kernels import LMHead, linear_divergence

NEAR_ONE = [1 - 2.0**-53, 1 - 1e-12, 1 - 2.0**-25, 1 - 1e-6]
BETAS = [5e-324, 1e-300, 1e-12, 2.0**-25, 1e-7, 1e-3, 1 / 16, 0.07, 0.5, 0.9, 15 / 16, 0.99, *NEAR_ONE]
STUDENT = [[0.3, -1.2, 2.0, 0.1], [0.0, -40.0, 3.0, -9.0], [0.5, 0.25, -0.5, 0.125], [0.0, 0.0, 150.0, -30.0]]
TEACHER = [[-0.5, 0.7, 1.0, 0.2], [-70.0, 2.0, 0.0, 1.0], [0.5, 0.25, -0.5, 0.126], [100.0, 0.0, -5.0, 20.0]]


def exactly(student, teacher, beta):
    """(D, dD / dz_s) of one row of logits, from the definition."""
    with localcontext() as context:
        context.prec = 60 + int(-math.log10(min(beta, 1 - beta)))
        beta = Decimal(beta)

        def probabilities(logits):
            exponentials = [Decimal(z).exp() for z in logits]
            return [e / sum(exponentials) for e in exponentials]

        p_s, p_t = probabilities(student), probabilities(teacher)
        m = [(1 - beta) * s + beta * t for s, t in zip(p_s, p_t, strict=True)]

        def kl(p, q):
            return sum(a * (a / b).ln() for a, b in zip(p, q, strict=True))

        to_mixture = kl(p_s, m)
        divergence = beta * kl(p_t, m) + (1 - beta) * to_mixture
        gradient = [(1 - beta) * a * ((a / b).ln() - to_mixture) for a, b in zip(p_s, m, strict=True)]
        return float(divergence), [float(g) for g in gradient]


def measured(dtype, impl, beta, copies=1, two_heads=False):
    """With every column `copies` times, which changes neither D nor its gradient."""
    head = LMHead(torch.eye(4, dtype=dtype).repeat(copies, 1))
    teacher_head = LMHead(head.weight.clone()) if two_heads else head
    student, teacher = torch.tensor(STUDENT, dtype=dtype, requires_grad=True), torch.tensor(TEACHER, dtype=dtype)
    divergence = linear_divergence(student, head, teacher, teacher_head, beta=beta, impl=impl)
    (gradient,) = torch.autograd.grad(divergence.sum(), student)
    return divergence.detach().double(), gradient.double()


@pytest.mark.parametrize(
    ("dtype", "impl", "how"),
    [
        (torch.float64, "reference", {}),
        (torch.float64, "torch", {}),
        (torch.float32, "reference", {}),
        (torch.float32, "torch", {}),
        # One head and two go different ways, and so do a whole vector and what is left of the columns.
        (torch.float32, "native", {}),
        (torch.float32, "native", {"two_heads": True}),
        (torch.float32, "native", {"copies": 16}),
        (torch.float32, "native", {"copies": 9, "two_heads": True}),
    ],
)
@pytest.mark.parametrize("beta", BETAS)
def test_every_beta(beta, dtype, impl, how):
    check(beta, dtype, impl, how)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's tensors are for the interpreter")
@pytest.mark.parametrize("beta", [1e-12, 2.0**-25, 1e-7, 0.5, 1 - 1e-6, 1 - 2.0**-25])
def test_every_beta_of_triton(beta):
    check(beta, torch.float32, "triton_chunked", {})


def check(beta, dtype, impl, how):
    # What the logits are after rounding to the dtype is what the exact value is of.
    rows = [
        exactly(*(torch.tensor(logits, dtype=dtype).tolist() for logits in pair), beta)
        for pair in zip(STUDENT, TEACHER, strict=True)
    ]
    exact = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    exact_gradient = torch.tensor([row[1] for row in rows], dtype=torch.float64)
    divergence, gradient = measured(dtype, impl, beta, **how)
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    # Relative to the divergence. Row 2 differs by 1e-3 in one logit: D is a square of that, and loses as many digits.
    eps *= 1 - math.log(min(beta, 1 - beta))  # a logarithm that long is rounded
    slack = torch.tensor([1.0, 1.0, 1e7 if impl == "reference" else 1e4, 1.0], dtype=torch.float64)
    assert (divergence >= 0).all()
    assert ((divergence - exact).abs() <= 40 * eps * slack * exact + tiny).all(), (divergence, exact)
    # A gradient is a difference of terms of the size of the divergence.
    scale = torch.maximum(exact_gradient.abs().amax(-1), exact) * slack
    error = (gradient - exact_gradient).abs()
    assert (error <= 40 * eps * scale.unsqueeze(-1) + 4 * tiny).all(), (gradient, exact_gradient)


@pytest.mark.parametrize("impl", ["native", "torch", "reference"])
def test_the_ends_are_the_limits(impl):
    """D / share at beta next to 0 and 1 is the KL there, in float32: no jump where `log(1 - beta)` was rounded away."""
    for beta, end, share in ((2.0**-40, 0.0, 2.0**-40), (1 - 2.0**-40, 1.0, 2.0**-40)):
        divergence, gradient = measured(torch.float32, impl, beta)
        limit, limit_gradient = measured(torch.float32, impl, end)
        torch.testing.assert_close(divergence[0] / share, limit[0], rtol=1e-4, atol=0.0)
        torch.testing.assert_close(gradient[0] / share, limit_gradient[0], rtol=1e-4, atol=1e-6)
