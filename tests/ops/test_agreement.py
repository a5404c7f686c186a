"""`agreement_weights` without loops over sequences, against the reference with them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unisd_kernels import agreement_weights, reference


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    num_views=st.integers(0, 4),
    level=st.sampled_from(["token", "sequence"]),
    statistic=st.sampled_from(["variance", "range"]),
    gamma=st.sampled_from([0.0, 0.01, 1.0, 50.0]),
    quantile=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 1000),
)
def test_matches_the_reference(lengths, num_views, level, statistic, gamma, quantile, seed):
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(num_views, sum(lengths), generator=generator, dtype=torch.float64) * 8
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    options = {"level": level, "statistic": statistic, "gamma": gamma, "quantile": quantile}
    ours = agreement_weights(logprobs, cu_seqlens, **options)
    expected = reference.agreement_weights(logprobs, cu_seqlens, **options)
    torch.testing.assert_close(ours.weights, expected.weights)
    torch.testing.assert_close(ours.disagreement, expected.disagreement)


def test_no_gradient_and_float32_from_sixteen_bits():
    logprobs = -torch.rand(3, 5, dtype=torch.bfloat16).requires_grad_()
    result = agreement_weights(logprobs, torch.tensor([0, 5]), gamma=1.0)
    assert result.weights.dtype == torch.float32
    assert not result.weights.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": torch.zeros(5)}, r"\[K, N\], got \(5,\)"),
        ({"cu_seqlens": torch.tensor([0, 4])}, r"end at the number of rows \(5\)"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 5])}, "never fall"),
        ({"level": "word"}, "level must be one of 'token', 'sequence', got 'word'"),
        ({"statistic": "std"}, "got 'std'"),
        ({"gamma": -1.0}, "gamma must be >= 0, got -1.0"),
        ({"quantile": 1.5}, r"quantile must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_input(change, message):
    arguments = {"logprobs": torch.zeros(2, 5), "cu_seqlens": torch.tensor([0, 5]), **change}
    with pytest.raises(ValueError, match=message):
        agreement_weights(**arguments)
