"""The dense mixture against scalars."""

import math

import torch

from unisd_kernels import LMHead, reference


def test_two_views_against_scalars():
    views = [torch.tensor([[value]], dtype=torch.float64) for value in (0.7, -1.2)]
    head = LMHead(*(torch.tensor(values, dtype=torch.float64) for values in ([[1.0], [0.0], [-2.0]], [0.1, 0.0, 0.3])))
    weights, tau = [1.5, -0.25], 0.8

    def probabilities(h):
        terms = [math.exp((w * h + b) / tau) for w, b in ((1.0, 0.1), (0.0, 0.0), (-2.0, 0.3))]
        return [term / sum(terms) for term in terms]

    first, second = probabilities(0.7), probabilities(-1.2)
    products = [p**1.5 * q**-0.25 for p, q in zip(first, second, strict=True)]
    expected = [math.log(product / sum(products)) for product in products]
    actual = reference.mixture_log_probs(views, weights, [head, head], tau)
    torch.testing.assert_close(actual[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=1e-13)


def test_views_of_two_heads_and_no_weight_at_all():
    """What no hidden state holds: two heads; and a product of nothing, which is uniform."""
    heads = [LMHead(torch.eye(3).double()), LMHead(2.0 * torch.eye(3).double())]
    views = [torch.tensor([[1.0, 0.0, -1.0]]).double(), torch.tensor([[0.0, 1.0, 0.5]]).double()]
    logits = 0.5 * views[0] + 0.5 * 2.0 * views[1]
    torch.testing.assert_close(reference.mixture_log_probs(views, [0.5, 0.5], heads), logits.log_softmax(-1))
    uniform = reference.mixture_log_probs(views, [0.0, 0.0], heads)
    torch.testing.assert_close(uniform, torch.full_like(uniform, -math.log(3)))
