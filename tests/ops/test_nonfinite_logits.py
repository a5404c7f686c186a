"""A logit that is not finite makes its row NaN: minus infinity does not drop out of the softmax, and a cap does not
make a number of it. The other rows keep theirs."""

from __future__ import annotations

import pytest
import torch

from tests.support import make_problem
from unisd_kernels import LMHead, linear_divergence, linear_logprobs, unisd_loss

# The rule is the same for every implementation; tests/ops/test_native_divergence.py and tests/triton hold theirs.
IMPLEMENTATIONS = ["torch", "reference"]
INF = float("inf")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("value", [INF, -INF, float("nan")])
@pytest.mark.parametrize("trains", [False, "hidden", "head"])
def test_scores_of_one_row(trains, value, softcap, impl):
    problem = make_problem(softcap=softcap, frozen_head=trains != "head").to(torch.float32)
    hidden = problem.student_hidden.detach().clone()
    hidden[3] = 0.0
    hidden[3, 1] = value
    hidden.requires_grad_(trains == "hidden")
    for entropy in (False, True):
        scores = linear_logprobs(
            hidden, problem.student_head, problem.target_ids, return_entropy=entropy, impl=impl, workspace_bytes=600
        )
        for statistic in scores:
            if statistic is not None:
                assert statistic.isnan().tolist() == [row == 3 for row in range(8)]
        if trains == "hidden":
            (gradient,) = torch.autograd.grad(scores.logprobs.sum() + scores.logsumexp.sum(), hidden)
            assert gradient.isfinite().all(-1).tolist() == [row != 3 for row in range(8)]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("value", [INF, -INF])
@pytest.mark.parametrize("where", ["student_hidden", "teacher_hidden"])
def test_divergence_of_one_row(where, value, softcap, beta, impl):
    problem = make_problem(softcap=softcap, frozen_head=True).to(torch.float32)
    getattr(problem, where).detach()[5, 2] = value
    divergence = linear_divergence(
        problem.student_hidden,
        problem.student_head,
        problem.teacher_hidden,
        problem.teacher_head,
        beta=beta,
        impl=impl,
    )
    assert divergence.isnan().tolist() == [row == 5 for row in range(8)]
    (gradient,) = torch.autograd.grad(divergence.sum(), problem.student_hidden)
    assert gradient.isfinite().all(-1).tolist() == [row != 5 for row in range(8)]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("head", ["student_head", "teacher_head", "auxiliary_head", "negative_head"])
def test_a_bias_of_minus_infinity_is_named(head, softcap, impl):
    problem = make_problem(softcap=softcap, frozen_head=True, bias=True).to(torch.float32)
    arguments = problem.arguments()
    before = problem.teacher_head
    bias = before.bias.detach().clone()
    bias[7] = -INF
    arguments[head] = LMHead(before.weight.detach(), bias, softcap=softcap)
    with pytest.warns(UserWarning, match=f"unisd_loss is nan: not finite: {head}.bias"):
        loss = unisd_loss(**arguments, impl=impl).loss
    assert loss.isnan()
    if head != "negative_head":  # a hinge that is NaN has no slope
        (gradient,) = torch.autograd.grad(loss, problem.student_hidden)
        assert not gradient.isfinite().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_product_that_overflows(impl):
    problem = make_problem(frozen_head=True, softcap=3.0).to(torch.float32)
    problem.teacher_head.weight.mul_(1e4)
    problem.teacher_hidden[1] *= 1e36
    with pytest.warns(UserWarning, match="unisd_loss is nan: the inputs are finite, so logits overflowed"):
        assert unisd_loss(**problem.arguments(), impl=impl).loss.isnan()
    # Large is not infinite.
    problem.teacher_hidden[1] /= 1e16
    assert unisd_loss(**problem.arguments(), impl=impl).loss.isfinite()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's tensors are for the interpreter")
@pytest.mark.parametrize(
    ("beta", "impl"),
    [
        (0.0, "triton_fused"),
        pytest.param(1.0, "triton_fused", marks=pytest.mark.exhaustive),
        pytest.param(0.0, "triton_chunked", marks=pytest.mark.exhaustive),
        (0.5, "triton_chunked"),
    ],
)
@pytest.mark.parametrize("value", [pytest.param(INF, marks=pytest.mark.exhaustive), -INF])
def test_triton(value, beta, impl):
    """A hidden state under a soft cap, of either side, and a bias without one."""
    for where in ("student_hidden", "teacher_hidden"):
        test_divergence_of_one_row(where, value, 3.0, beta, impl)
    for trains in (False, "hidden"):
        test_scores_of_one_row(trains, value, 3.0, impl)
    problem = make_problem(softcap=None, frozen_head=True, bias=True).to(torch.float32)
    bias = problem.teacher_head.bias.detach().clone()
    bias[7] = value
    spoilt = LMHead(problem.teacher_head.weight.detach(), bias)
    own = LMHead(problem.student_head.weight.detach(), problem.student_head.bias.detach())
    # On both sides the logit drops out of the difference of hidden states.
    for student_head, teacher_head in ((spoilt, own), (own, spoilt), (spoilt, spoilt)):
        rows = (problem.student_hidden, student_head, problem.teacher_hidden, teacher_head)
        divergence = linear_divergence(*rows, beta=beta, impl=impl)
        assert divergence.isnan().all()
        (gradient,) = torch.autograd.grad(divergence.sum(), problem.student_hidden)
        assert gradient.isnan().all()
    assert linear_logprobs(problem.student_hidden, spoilt, problem.target_ids, impl=impl).logprobs.isnan().all()
