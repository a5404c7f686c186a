"""The dense log-probabilities, against scalar arithmetic written out and against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support import make_problem
from unisd_kernels import LMHead, reference


def scalar_statistics(hidden, weight, bias, scale, cap, temperature, target):
    """One row, in Python floats, straight from the definition."""
    logits = []
    for row, b in zip(weight, bias, strict=True):
        x = scale * (sum(h * w for h, w in zip(hidden, row, strict=True)) + b)
        if cap is not None:
            x = cap * math.tanh(x / cap)
        logits.append(x / temperature)
    top = max(logits)
    logsumexp = top + math.log(sum(math.exp(z - top) for z in logits))
    probs = [math.exp(z - logsumexp) for z in logits]
    entropy = logsumexp - sum(p * z for p, z in zip(probs, logits, strict=True))
    return logits[target] - logsumexp, logsumexp, entropy


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_matches_the_definition_in_scalars(cap, scale):
    problem = make_problem(bias=True, vocab_size=7, hidden_size=3, logit_scale=scale, softcap=cap)
    result = reference.linear_logprobs(
        problem.student_hidden, problem.student_head, problem.target_ids, temperature=0.7, return_entropy=True
    )
    for n in range(problem.student_hidden.shape[0]):
        expected = scalar_statistics(
            problem.student_hidden[n].tolist(),
            problem.student_head.weight.tolist(),
            problem.student_head.bias.tolist(),
            scale,
            cap,
            0.7,
            int(problem.target_ids[n]),
        )
        got = [float(part[n]) for part in result]
        assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_gradcheck(cap):
    problem = make_problem(bias=True, vocab_size=7, hidden_size=3, logit_scale=1.3, softcap=cap)
    head = problem.student_head

    def function(hidden, weight, bias):
        return tuple(reference.linear_logprobs(hidden, LMHead(weight, bias, 1.3, cap), problem.target_ids, 0.7, True))

    assert torch.autograd.gradcheck(function, (problem.student_hidden, head.weight, head.bias))


def test_padding_columns_take_no_part():
    padded = make_problem(padded_vocab=4, bias=True)
    head = padded.student_head
    short = LMHead(head.weight[:23].detach(), head.bias[:23].detach())
    got = reference.linear_logprobs(padded.student_hidden, head, padded.target_ids, return_entropy=True)
    want = reference.linear_logprobs(padded.student_hidden, short, padded.target_ids, return_entropy=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    (gradient,) = torch.autograd.grad(got.logprobs.sum(), head.weight)
    assert gradient[23:].abs().max() == 0
    assert gradient[:23].abs().max() > 0


def test_sixteen_bit_inputs_give_float32_statistics():
    problem = make_problem(dtype=torch.bfloat16).to(torch.bfloat16)
    result = reference.linear_logprobs(problem.student_hidden, problem.student_head, problem.target_ids)
    assert result.logprobs.dtype == torch.float32
