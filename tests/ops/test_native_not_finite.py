"""The C++ backend on what is not finite: a NaN or an infinity in a hidden state, a weight or a bias makes NaN of every
row it reaches, of its statistics and its gradient; never a number, and never of another row."""

from __future__ import annotations

import math

import pytest
import torch

from unisd_kernels import LMHead, linear_divergence, linear_logprobs, unisd_loss

VALUES = [math.nan, math.inf, -math.inf]
HEADS = {"plain": {}, "softcap": {"softcap": 5.0}, "scale": {"logit_scale": 0.5}}
ROWS, WIDTH, COLUMNS, ROW = 6, 8, 70, 2


def spoilt(where, value, head, teacher="own"):
    """Hidden states of student and teacher and their heads, `value` once in one of them, and the rows it reaches.
    `teacher`: has it the student's head, which is then projected on differences, or its own?"""
    generator = torch.Generator().manual_seed(0)
    hidden = {name: torch.randn(ROWS, WIDTH, generator=generator) for name in ("student", "teacher")}
    weight, bias = torch.randn(COLUMNS, WIDTH, generator=generator), torch.randn(COLUMNS, generator=generator)
    heads = [LMHead(weight.clone(), bias.clone(), **HEADS[head]) for _ in range(2)]
    if teacher == "student's":
        heads[1] = heads[0]
    target = {"weight": heads[0].weight, "bias": heads[0].bias[3:]}.get(where)
    if target is None:
        hidden[where][ROW, 1] = value
    else:
        target.view(-1)[0] = value
    return (
        hidden["student"],
        heads[0],
        hidden["teacher"],
        heads[1],
        [target is not None or n == ROW for n in range(ROWS)],
    )


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("teacher", ["own", "student's"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("where", ["student", "teacher", "weight", "bias"])
def test_divergence(where, head, teacher, value):
    *arguments, expected = spoilt(where, value, head, teacher)
    student = arguments[0].requires_grad_()
    for beta in (0.0, 0.5, 1.0):
        ours = linear_divergence(*arguments, beta=beta, impl="native")
        assert ours.isnan().tolist() == expected
        (gradient,) = torch.autograd.grad(ours.nansum() + ours.sum(), student)
        assert gradient.isnan().all(-1).tolist() == expected


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("where", ["student", "weight", "bias"])
def test_logprobs(where, head, value):
    student, own, _, _, expected = spoilt(where, value, head)
    ids = torch.arange(ROWS)
    for hidden in (student, student.clone().requires_grad_()):
        result = linear_logprobs(hidden, own, ids, return_entropy=True, impl="native")
        for values in result:
            assert values.isnan().tolist() == expected


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("where", ["student", "teacher", "bias"])
def test_loss(where, head, value):
    *arguments, _ = spoilt(where, value, head)
    student = arguments[0].requires_grad_()
    with pytest.warns(UserWarning, match="unisd_loss is nan"):
        result = unisd_loss(*arguments, torch.arange(ROWS), torch.tensor([0, 4, ROWS]), impl="native")
    assert result.loss.isnan()
    result.loss.backward()
    assert student.grad.isnan().any()
