"""The dense objective: reductions by hand, switches, and finite differences of everything at once."""

from __future__ import annotations

import pytest
import torch

from tests.support import make_problem
from unisd_kernels import LMHead, reference, unisd_loss
from unisd_kernels.reference.loss import reduce_per_token

V = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
W = torch.tensor([0.5, 1.0, 1.0, 2.0], dtype=torch.float64)
CU = torch.tensor([0, 1, 1, 4])


@pytest.mark.parametrize(
    ("normalization", "kind", "expected"),
    [
        # sequence 0: 0.5 / max(0.5, 1); sequence 1: empty; sequence 2: (2 + 4 + 16) / 4; mean over three
        ("sequence", "weighted", (0.5 / 1 + 0 + 22 / 4) / 3),
        ("sequence", "count", (0.5 / 1 + 0 + 22 / 3) / 3),
        ("token", "weighted", 22.5 / 4.5),
        ("token", "count", 22.5 / 4),
    ],
)
def test_reduction_by_hand(normalization, kind, expected):
    assert float(reduce_per_token(V, CU, normalization, W, kind)) == pytest.approx(expected)


def run(problem, **options):
    return unisd_loss(**problem.arguments(), impl="reference", **options)


def test_total_is_the_weighted_sum_of_its_parts():
    problem = make_problem()
    result = run(problem, contrastive_weight=0.3, feature_weight=0.2, divergence_weight=0.7)
    expected = 0.7 * result.divergence_loss + 0.3 * result.contrastive_loss + 0.2 * result.feature_loss
    torch.testing.assert_close(result.loss.detach(), expected)
    assert min(float(result.divergence_loss), float(result.contrastive_loss), float(result.feature_loss)) > 0


def test_plain_loss_is_the_mean_over_sequences_of_the_mean_divergence():
    problem = make_problem(num_auxiliary=0, negative=False)
    d = reference.linear_divergence(
        problem.student_hidden, problem.student_head, problem.teacher_hidden, problem.teacher_head
    )
    expected = (d[0:3].mean() + 0.0 + d[3:8].mean()) / 3
    torch.testing.assert_close(run(problem).loss, expected)


def test_sequence_weights_cancel_when_weighted_and_count_by_default():
    """The flaw of the public code that `weight_normalization` exists for: sequences long enough that sum(w) > 1."""
    problem = make_problem(lengths=(6, 7), negative=False)
    plain = run(make_problem(lengths=(6, 7), negative=False, num_auxiliary=0)).loss
    options = {"agreement": "sequence", "agreement_gamma": 0.5}
    default = run(problem, **options)
    assert default.weights.min() > 0.2
    assert default.weights.max() < 1.0
    torch.testing.assert_close(run(problem, weight_normalization="weighted", **options).loss, plain)
    torch.testing.assert_close(run(problem, weight_normalization="count", **options).loss, default.loss)
    assert default.loss < 0.99 * plain


def test_agreement_is_scored_at_temperature_one():
    problem = make_problem()
    a, b = run(problem, temperature=0.5), run(problem, temperature=2.0)
    torch.testing.assert_close(a.auxiliary_logprobs, b.auxiliary_logprobs)
    assert (a.negative_logprobs - b.negative_logprobs).abs().max() > 1e-3


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_gradcheck(beta, normalization):
    problem = make_problem(vocab_size=9, hidden_size=3, bias=True, softcap=5.0, token_weights=True)
    arguments = problem.arguments()

    def function(hidden, weight, bias):
        arguments.update(student_hidden=hidden, student_head=LMHead(weight, bias, 1.0, 5.0))
        return unisd_loss(
            **arguments,
            beta=beta,
            temperature=0.8,
            clip_cap=2.0,
            agreement_gamma=0.5,
            contrastive_weight=0.3,
            contrastive_margin=1.0,
            feature_weight=0.2,
            normalization=normalization,
            impl="reference",
        ).loss

    head = problem.student_head
    assert torch.autograd.gradcheck(function, (problem.student_hidden, head.weight, head.bias))
