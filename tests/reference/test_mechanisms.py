"""Clipping, agreement, contrast and features against numbers worked out by hand or with numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unisd_kernels import reference
from unisd_kernels.ops.quantile import linear_quantile


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), st.floats(0, 1))
def test_quantile_is_numpys(values, q):
    got = float(linear_quantile(torch.tensor(values, dtype=torch.float64), q))
    assert got == pytest.approx(float(np.quantile(np.array(values), q)), rel=1e-9, abs=1e-9)


def test_quantile_of_more_elements_than_torch_allows():
    values = torch.arange(2**24 + 9, dtype=torch.float32)
    assert float(linear_quantile(values, 0.5)) == pytest.approx((2**24 + 8) / 2, rel=1e-6)


def test_quantile_shows_nan():
    assert linear_quantile(torch.tensor([1.0, float("nan"), 2.0]), 0.1).isnan()


def test_clip_keeps_what_is_at_or_below_the_cap():
    d = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    kept = reference.clip_divergence(d, 1.0)
    assert kept.tolist() == [0.5, 1.0, 1.0]
    (gradient,) = torch.autograd.grad(kept.sum(), d)
    assert gradient.tolist() == [1.0, 1.0, 0.0]


def test_quantile_cap_has_a_floor():
    assert float(reference.clip_cap_from_quantile(torch.zeros(4), 0.9)) == pytest.approx(1e-6)
    assert float(reference.clip_cap_from_quantile(torch.tensor([0.0, 1.0, 2.0]), 0.75)) == pytest.approx(1.5)


LP = torch.tensor([[-1.0, -2.0, -0.5, -3.0], [-1.5, -2.0, -2.5, -1.0], [-0.5, -2.0, -4.0, -2.0]], dtype=torch.float64)
CU = torch.tensor([0, 2, 2, 4])


@pytest.mark.parametrize("statistic", ["variance", "range"])
def test_token_weights_by_numpy(statistic):
    lp = LP.numpy()
    d = lp.var(axis=0, ddof=1) if statistic == "variance" else lp.max(axis=0) - lp.min(axis=0)
    scale = max(np.quantile(d, 0.95), 1e-6)
    expected = np.maximum(1 / (1 + 0.3 * np.minimum(d / scale, 10)), 0.01)
    got = reference.agreement_weights(LP, CU, level="token", statistic=statistic, gamma=0.3)
    np.testing.assert_allclose(got.disagreement.numpy(), d, rtol=1e-12)
    np.testing.assert_allclose(got.weights.numpy(), expected, rtol=1e-12)
    assert got.weights[1] == 1.0  # the views agree there


@pytest.mark.parametrize("statistic", ["variance", "range"])
def test_sequence_weights_by_numpy(statistic):
    means = np.stack([LP[:, 0:2].numpy().mean(1), np.zeros(3), LP[:, 2:4].numpy().mean(1)], axis=1)
    d = means.var(axis=0) if statistic == "variance" else means.max(axis=0) - means.min(axis=0)
    w = np.maximum(np.exp(-2.0 * d), 1e-6)
    got = reference.agreement_weights(LP, CU, level="sequence", statistic=statistic, gamma=2.0)
    np.testing.assert_allclose(got.disagreement.numpy(), d, rtol=1e-12)
    np.testing.assert_allclose(got.weights.numpy(), [w[0], w[0], w[2], w[2]], rtol=1e-12)


def test_floors_of_the_weights():
    wild = torch.tensor([[0.0, 0.0], [-1000.0, -900.0]], dtype=torch.float64)
    token = reference.agreement_weights(wild, torch.tensor([0, 2]), level="token", gamma=1e6)
    assert token.weights.tolist() == [0.01, 0.01]
    sequence = reference.agreement_weights(wild, torch.tensor([0, 2]), level="sequence", gamma=1e6)
    assert sequence.weights.tolist() == [1e-6, 1e-6]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("num_views", [0, 1])
def test_fewer_than_two_views_weigh_one(level, num_views):
    got = reference.agreement_weights(LP[:num_views], CU, level=level, gamma=5.0)
    assert got.weights.tolist() == [1.0] * 4


def test_contrastive_by_hand():
    s = torch.tensor([-1.0, -1.0, -2.0], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([-3.0, -1.5, -1.0], dtype=torch.float64)
    n = torch.tensor([-1.5, -4.0, -4.0], dtype=torch.float64)
    c = reference.contrastive_hinge(s, t, n, margin=0.5)
    # 0.5 + 2 - 0.5; 0.5 + 0.5 - 3 < 0; 0.5 + 1 - 2 < 0
    assert c.tolist() == pytest.approx([2.0, 0.0, 0.0])
    (gradient,) = torch.autograd.grad(c.sum(), s)
    # sign(s - t) - sign(s - n) = 1 - 1 where active: moving s does not change the difference there.
    assert gradient.tolist() == [0.0, 0.0, 0.0]
    between = reference.contrastive_hinge(s[:1], t[:1], torch.tensor([-0.5], dtype=torch.float64), margin=0.5)
    (gradient,) = torch.autograd.grad(between, s)
    assert gradient.tolist() == [2.0, 0.0, 0.0]


def test_contrastive_gradcheck():
    s = torch.tensor([-1.0, -2.0, -0.3], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([-1.7, -1.1, -0.9], dtype=torch.float64)
    n = torch.tensor([-0.4, -3.0, -0.1], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: reference.contrastive_hinge(x, t, n, 1.5), (s,))


def test_features_by_hand():
    s = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[0.0, 4.0]], dtype=torch.float64, requires_grad=True)
    f = reference.feature_distance(s, t)
    assert f.tolist() == [2.5]
    f.sum().backward()
    assert s.grad.tolist() == [[1.0, -2.0]]
    assert t.grad is None


def test_ema_by_hand():
    teacher = [torch.tensor([1.0, 2.0], dtype=torch.float64)]
    reference.ema_update_(teacher, [torch.tensor([3.0, 0.0])], 0.75)
    assert teacher[0].tolist() == [1.5, 1.5]
