"""The C++ backend's softmax and log-probability gradient of complete rows, and its scaling of rows, against float64:
at most twice the error of PyTorch in float32."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.native_tiles import (
    CANARY,
    CAP_STRATEGY,
    COLUMNS_STRATEGY,
    MASKED,
    NOT_FINITE,
    assert_all_accurate,
    entropy_of,
    frame_is_untouched,
    gradient_of,
    inside,
    logits,
    make_ids,
    make_tile,
    needs_library,
    picked,
)
from tests.support import FLOOR, assert_accurate
from unisd_kernels.backends import extension
from unisd_kernels.backends.base import ScoreGrads, Scores
from unisd_kernels.backends.torch import TorchBackend
from unisd_kernels.backends.transform import LogitTransform

pytestmark = needs_library


def softmax_in(dtype, tile, cap, ids):
    x = tile.to(dtype, copy=True).requires_grad_()
    z = logits(x, cap)
    logsumexp = z.logsumexp(-1)
    return gradient_of(logsumexp.sum(), x, cap), logsumexp.detach(), picked(z, ids).detach()


@settings(max_examples=60)
@given(st.integers(0, 7), COLUMNS_STRATEGY, CAP_STRATEGY, st.integers(0, 1000))
def test_softmax(rows, columns, cap, seed):
    tile, ids = make_tile(rows, columns, seed, cap), make_ids(rows, columns, seed)
    ours = [inside(tile, 1, seed % 4, seed % 7, CANARY), torch.full((rows,), torch.nan), torch.full((rows,), torch.nan)]
    extension.operations().tile_softmax_(ours[0], cap, ids, ours[1], ours[2])
    assert frame_is_untouched(ours[0], CANARY)
    exact, native = (softmax_in(dtype, tile, cap, ids) for dtype in (torch.float64, torch.float32))
    assert_all_accurate(("softmax", "logsumexp", "target logit"), ours, exact, native)


def logprob_gradient_in(dtype, tile, cap, ids, logprob_weight, logsumexp_weight, entropy_weight):
    x = tile.to(dtype, copy=True).requires_grad_()
    z = logits(x, cap)
    logprobs = z.log_softmax(-1)
    terms = (
        (logprob_weight, picked(logprobs, ids)),
        (logsumexp_weight, z.logsumexp(-1)),
        (entropy_weight, entropy_of(logprobs)),
    )
    total = sum(((weight.to(dtype) * value).sum() for weight, value in terms if weight is not None), 0.0 * z.sum())
    return gradient_of(total, x, cap)


@settings(max_examples=80)
@given(
    st.integers(0, 7),
    COLUMNS_STRATEGY,
    CAP_STRATEGY,
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.integers(0, 1000),
)
def test_logprob_gradient(rows, columns, cap, with_weights, seed):
    tile, ids = make_tile(rows, columns, seed, cap), make_ids(rows, columns, seed)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(rows, generator=generator) if wanted else None for wanted in with_weights]
    exact = logprob_gradient_in(torch.float64, tile, cap, ids, *weights)
    wide = logits(tile.double(), cap)
    logsumexp, entropy = wide.logsumexp(-1).float(), entropy_of(wide.log_softmax(-1)).float()
    ours = inside(tile, 1, seed % 4, seed % 7, CANARY)
    extension.operations().tile_logprob_gradient_(
        ours, cap, logsumexp, ids, weights[0], weights[1], entropy if with_weights[2] else None, weights[2]
    )
    assert frame_is_untouched(ours, CANARY)
    # From the same statistics, rounded to float32.
    native = tile.clone()
    scores = Scores(logsumexp, logsumexp, entropy)
    TorchBackend().score_backward(native, native, LogitTransform(1.0, cap, 1.0), ids, scores, ScoreGrads(*weights))
    # Both get the log-sum-exp in float32, which is off by 2^-24 of it; so are the probabilities they make of it.
    total = sum((weight.abs() for weight in weights if weight is not None), torch.zeros(rows))
    rounding = 2.0**-24 * logsumexp.abs() * total * (1.0 + entropy)
    assert_accurate("gradient", ours, exact, native, difference_of=rounding / FLOOR[torch.float32])


def test_gradients_of_masked_columns():
    tile, ids = make_tile(3, 2100, 0), torch.tensor([7, 8, 9])
    keep = torch.zeros(2100, dtype=torch.bool)
    keep[5:40] = True
    tile[:, ~keep] = MASKED
    weight = torch.randn(3)
    small, place = tile[:, keep], ids - 5
    exact, native = (
        logprob_gradient_in(d, small, None, place, weight, weight, weight) for d in (torch.float64, torch.float32)
    )
    wide = small.double()
    ours = tile.clone()
    extension.operations().tile_logprob_gradient_(
        ours, None, wide.logsumexp(-1).float(), ids, weight, weight, entropy_of(wide.log_softmax(-1)).float(), weight
    )
    assert not ours[:, ~keep].any()
    assert_accurate("gradient", ours[:, keep], exact, native)
    softmax, rows = tile.clone(), [torch.empty(3), torch.empty(3)]
    extension.operations().tile_softmax_(softmax, None, ids, *rows)
    assert not softmax[:, ~keep].any()
    torch.testing.assert_close(softmax[:, keep], small.softmax(-1))


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("column", [0, 16, 2000, 3000])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_a_logit_that_is_not_finite_makes_nan_of_its_row_only(cap, column, value):
    tile, ids = make_tile(3, 3001, 0), torch.full((3,), 5)
    tile[1, column] = value
    softmax, rows = tile.clone(), [torch.empty(3), torch.empty(3)]
    extension.operations().tile_softmax_(softmax, cap, ids, *rows)
    for values in (rows[0], softmax.sum(-1)):
        assert values.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(st.integers(0, 7), COLUMNS_STRATEGY, st.integers(0, 1000))
def test_scale_rows(dtype, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * 10.0 ** torch.randint(-8, 6, (1,), generator=generator)
    scale = torch.randn(rows, generator=generator)
    out = inside(torch.zeros(rows, columns, dtype=dtype), 1, 2, 3, -7.0)
    extension.operations().scale_rows(inside(values, 1, 1, 5, torch.nan), scale, out)
    assert frame_is_untouched(out, -7.0)
    assert torch.equal(out, (values * scale.unsqueeze(-1)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scale_rows_rounds_to_nearest_even(dtype):
    """Every 16-bit number and the midpoints between neighbours; infinities and NaN."""
    narrow = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    middle = (narrow[:-1] + narrow[1:]) / 2
    values = torch.cat(
        [narrow, middle, torch.nextafter(middle, torch.tensor(math.inf)), middle.nextafter(torch.tensor(-math.inf))]
    )
    out = torch.empty(1, values.numel(), dtype=dtype)
    extension.operations().scale_rows(values.unsqueeze(0), torch.ones(1), out)
    torch.testing.assert_close(out[0], values.to(dtype), rtol=0, atol=0, equal_nan=True)
