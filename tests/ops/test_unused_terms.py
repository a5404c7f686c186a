"""`return_statistics=False`: what a term of weight 0 would need is neither computed nor returned, and nothing else
changes."""

from __future__ import annotations

import pytest
import torch

from tests.support import make_problem
from unisd_kernels import UniSDLoss, unisd_loss

OF_DIVERGENCE = {"divergence", "clipped", "weights", "auxiliary_logprobs", "disagreement"}
OF_CONTRAST = {"negative_logprobs", "contrastive"}
OF_EITHER = {"student_logprobs", "teacher_logprobs", "student_entropy", "teacher_entropy"}


@pytest.mark.parametrize("impl", ["native", "torch", "reference"])
@pytest.mark.parametrize("frozen_head", [True, False])
@pytest.mark.parametrize("contrastive_weight", [0.0, 0.1])
@pytest.mark.parametrize("divergence_weight", [0.0, 1.0])
def test_the_same_loss_and_gradients(divergence_weight, contrastive_weight, frozen_head, impl):
    problem = make_problem(frozen_head=frozen_head, bias=True, token_weights=True).to(torch.float32)
    options = {
        "divergence_weight": divergence_weight,
        "contrastive_weight": contrastive_weight,
        "contrastive_margin": 2.0,
        "feature_weight": 0.3,
        "clip_quantile": 0.7,
        "num_items": 5,
        "impl": impl,
    }
    whole = unisd_loss(**problem.arguments(), **options)
    ours = unisd_loss(**problem.arguments(), **options, return_statistics=False)
    assert all(value is not None for value in whole)
    absent = set()
    if not divergence_weight:
        absent |= OF_DIVERGENCE
    if not contrastive_weight:
        absent |= OF_CONTRAST
    if not divergence_weight and not contrastive_weight:
        absent |= OF_EITHER
    assert {name for name in UniSDLoss._fields if getattr(ours, name) is None} == absent
    assert float(whole.loss.detach()) > 0.01
    terms = {"divergence_loss": divergence_weight, "contrastive_loss": contrastive_weight}
    for name in set(UniSDLoss._fields) - absent:
        expected = getattr(whole, name) if terms.get(name, 1.0) else torch.zeros(())
        torch.testing.assert_close(getattr(ours, name), expected, msg=name)
    # The reference has no path to a head that no term uses.
    gradients, expected = (
        torch.autograd.grad(each.loss, problem.leaves, allow_unused=impl == "reference") for each in (ours, whole)
    )
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)
    assert gradients[0].abs().max() > 1e-3


def test_a_term_that_is_left_out_is_not_looked_at():
    """Nor is a NaN of its own."""
    problem = make_problem(frozen_head=True).to(torch.float32)
    problem.auxiliary_hidden[0][0] = torch.nan
    result = unisd_loss(**problem.arguments(), divergence_weight=0.0, contrastive_margin=2.0, return_statistics=False)
    assert float(result.loss.detach()) > 0
    with pytest.warns(UserWarning, match=r"auxiliary_hidden\[0\]"):
        assert unisd_loss(**problem.arguments(), divergence_weight=0.0).loss.isnan()
