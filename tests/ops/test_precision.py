"""Sums and quotients at the precision of the result: nothing passes through float32 on the way to float64, and nothing
loses digits because logits are large."""

from __future__ import annotations

import pytest
import torch

from tests.support import make_problem
from unisd_kernels import LMHead, agreement_weights, linear_divergence, linear_logprobs, reference, unisd_loss
from unisd_kernels.reference.clipping import clip_divergence

IMPLEMENTATIONS = ["torch", "reference"]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("normalization", ["sequence", "token"])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.float32])
def test_num_items_as_a_tensor_is_num_items_as_a_number(kind, normalization, impl):
    problem = make_problem(frozen_head=True)
    options = {"normalization": normalization, "feature_weight": 0.1, "impl": impl}
    losses = [unisd_loss(**problem.arguments(), num_items=n, **options).loss for n in (7, torch.tensor(7, dtype=kind))]
    # 3 / 7 in float32 is off by 2e-8.
    torch.testing.assert_close(*losses, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_constant_cap_keeps_its_digits(impl):
    """0.1 in float32 is off by 1.5e-8."""
    problem = make_problem(frozen_head=True, num_auxiliary=0, negative=False)
    result = unisd_loss(**problem.arguments(), clip_cap=0.1, impl=impl)
    assert result.clipped.all()
    assert float(result.loss.detach()) == pytest.approx(0.2 / 3, rel=1e-14)  # of three sequences one is empty
    kept = clip_divergence(torch.tensor([0.05, 0.3], dtype=torch.float64), 0.1)
    assert kept.tolist() == [0.05, 0.1]


@pytest.mark.parametrize("impl", ["native", "torch", "reference"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_divergence_is_not_negative_and_keeps_its_gradient(beta, impl):
    """Near zero all that is left of D may be rounding; its gradient has digits there."""
    generator = torch.Generator().manual_seed(0)
    head = LMHead(torch.randn(300, 16, generator=generator))
    teacher = torch.randn(64, 16, generator=generator)
    student = (teacher + 1e-5 * torch.randn(64, 16, generator=generator)).requires_grad_()
    divergence = linear_divergence(student, head, teacher, head, beta=beta, impl=impl)
    assert float(divergence.detach().min()) >= 0.0
    (gradient,) = torch.autograd.grad(divergence.sum(), student)
    wide = student.detach().double().requires_grad_()
    wide_head = LMHead(head.weight.double())
    exact = linear_divergence(wide, wide_head, teacher.double(), wide_head, beta=beta, impl="reference").sum()
    (expected,) = torch.autograd.grad(exact, wide)
    error = (gradient.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 0.1
    # Cut off where D was below zero, it would be nothing there.
    assert (gradient.abs().amax(-1) > 0).all()


def test_the_plain_formula_does_come_out_below_zero():
    """Or the test above would test nothing."""
    generator = torch.Generator().manual_seed(0)
    weight, teacher = torch.randn(300, 16, generator=generator), torch.randn(64, 16, generator=generator)
    student = teacher + 1e-5 * torch.randn(64, 16, generator=generator)
    log_s, log_t = (torch.log_softmax(hidden @ weight.T, -1) for hidden in (student, teacher))
    assert float(reference.divergence.kl(log_t, log_s).min()) < 0.0


@pytest.mark.parametrize("impl", ["native", *IMPLEMENTATIONS])
@pytest.mark.parametrize("shift", [0.0, 300.0, -3000.0])
def test_entropy_over_vocabulary_tiles_does_not_depend_on_the_size_of_the_logits(shift, impl):
    """Logits on a grid of 1/8 around `shift` are exact in float32, and so is their difference to the largest."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(2000, 1, generator=generator) * 12).round() / 4 + shift
    hidden, ids = torch.ones(3, 1), torch.tensor([0, 5, 1999])
    scores = linear_logprobs(
        hidden,
        LMHead(logits),
        ids,
        return_entropy=True,
        impl=impl,
        workspace_bytes=3 * 4 * 20 if impl == "torch" else None,
    )
    p = torch.softmax(logits.double().squeeze(-1), 0)
    exact = -(p * p.log()).sum()
    torch.testing.assert_close(scores.entropy.double(), exact.expand(3), rtol=2e-6, atol=0.0)
    torch.testing.assert_close(
        scores.logsumexp.double(), torch.logsumexp(logits.double(), 0).expand(3), rtol=2e-7, atol=1e-6
    )


def test_a_sequence_weight_depends_on_its_own_sequence():
    """To the exact mean of its rows, whatever the others hold."""
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(2, 5000, generator=generator) * 8
    cu_seqlens = torch.tensor([0, 4998, 4998, 5000])
    ours = agreement_weights(logprobs, cu_seqlens, level="sequence", gamma=5.0).disagreement.double()
    exact = reference.agreement_weights(logprobs.double(), cu_seqlens, level="sequence", gamma=5.0).disagreement
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=0.0)
