"""The CPU matrix products against float64, held to twice the error of torch.mm in float32."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.native_tiles import frame_is_untouched, inside, needs_library
from tests.support import assert_accurate
from unisd_kernels.backends import extension

pytestmark = needs_library

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CANARY = -12345.0
# Just above and below where blocks (64), pieces of work (512, 2048) and vectors (8, 16) end.
COLUMNS = sorted({n + d for n in (8, 16, 48, 64, 96, 128, 512, 1024, 2048, 4096) for d in (-1, 0, 1)} | {1, 2, 5000})
# The last two are more than one group of rows of the backward product (192).
ROWS = [0, 1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 95, 96, 97, 144, 145, 150, 193, 390]
WIDTHS = [1, 2, 3, 7, 15, 16, 17, 31, 33, 47, 48, 49, 63, 95, 97, 127, 128, 129, 191, 193, 200]


@st.composite
def operands(draw: st.DrawFn):
    """hidden [N, H], weight [V, H], bias or None; in storage with NaN around them."""
    rows = draw(st.one_of(st.sampled_from(ROWS), st.integers(0, 150)))
    width = draw(st.one_of(st.sampled_from(WIDTHS), st.integers(1, 200)))
    columns = draw(st.one_of(st.sampled_from(COLUMNS), st.integers(1, 5000)))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = (torch.randn(columns, width, generator=generator) * (2.0 / width**0.5)).to(dtype)
    # The first and the last columns matter to every sum.
    weight[0] *= 3
    weight[-1] *= 3
    if draw(st.booleans()):
        left, right = draw(st.tuples(st.integers(0, 5), st.integers(0, 40)))
        hidden = inside(hidden, 1, left, right, torch.nan)
        weight = inside(weight, 1, right, left, torch.nan)
    bias = torch.randn(columns, generator=generator) if draw(st.booleans()) else None
    scale = draw(st.sampled_from([1.0, 0.25, -1.5]))
    return hidden, weight, bias, scale


def logits_in(dtype, hidden, weight, bias, scale):
    product = torch.mm(hidden.to(dtype), weight.to(dtype).T)
    return scale * (product if bias is None else product + bias.to(dtype))


def scores_in(dtype, hidden, weight, bias, scale, tanh_scale, ids):
    z = logits_in(dtype, hidden, weight, bias, scale)
    if tanh_scale is not None:
        z = tanh_scale * torch.tanh(z)
    logsumexp = z.logsumexp(-1)
    logprobs = z.log_softmax(-1)
    return logsumexp, z.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


def check_logits(hidden, weight, bias, scale, out) -> None:
    extension.operations().linear_logits(hidden, weight, bias, scale, out)
    exact, native = (logits_in(dtype, hidden, weight, bias, scale) for dtype in (torch.float64, torch.float32))
    assert_accurate("logits", out, exact, native)


def check_score(hidden, weight, bias, scale, tanh_scale, ids, want_entropy) -> None:
    # Whatever was there before is overwritten.
    ours = [torch.full((hidden.shape[0],), torch.nan) for _ in range(3 if want_entropy else 2)]
    extension.operations().linear_score(
        hidden, weight, bias, scale, tanh_scale, ids, ours[0], ours[1], ours[2] if want_entropy else None
    )
    exact, native = (
        scores_in(dtype, hidden, weight, bias, scale, tanh_scale, ids) for dtype in (torch.float64, torch.float32)
    )
    for name, *tensors in zip(("logsumexp", "target logit", "entropy"), ours, exact, native):  # without the entropy
        assert_accurate(name, *tensors)


def check_backward(gradient, weight, scale, out) -> None:
    # With a bfloat16 weight a product may round the gradient to as much; these numbers need no rounding.
    if weight.dtype == torch.bfloat16:
        gradient = gradient.bfloat16().float()
    extension.operations().linear_backward(gradient, weight, scale, out)
    exact, native = (scale * torch.mm(gradient.to(d), weight.to(d)) for d in (torch.float64, torch.float32))
    assert_accurate("hidden gradient", out, exact, native)


@settings(max_examples=40)
@given(operands(), st.booleans(), st.integers(0, 5), st.integers(0, 40))
def test_weight_gradient(given_operands, accumulate, left, right):
    hidden, weight, _, scale = given_operands
    if hidden.shape[0] == 0:
        return
    gradient = torch.randn(hidden.shape[0], weight.shape[0])
    # Numbers that a product with bfloat16 hidden states need not round.
    if hidden.dtype == torch.bfloat16:
        gradient = (gradient * scale).bfloat16().float() / scale
    before = torch.randn(weight.shape) if accumulate else torch.full(weight.shape, torch.nan)
    out = inside(before, 1, left, right, CANARY)
    inner = inside(gradient, 1, right, left, torch.nan)
    extension.operations().linear_weight_gradient(inner, hidden, scale, accumulate, out)
    exact, native = (scale * torch.mm(gradient.to(d).T, hidden.to(d)) for d in (torch.float64, torch.float32))
    if accumulate:
        exact, native = exact + before.double(), native + before
    assert_accurate("weight gradient", out, exact, native)
    assert frame_is_untouched(out, CANARY)


@settings(max_examples=80)
@given(operands(), st.integers(0, 5), st.integers(0, 40))
def test_logits(given_operands, left, right):
    hidden, weight, _, _ = given_operands
    out = inside(torch.zeros(hidden.shape[0], weight.shape[0]), 2, left, right, CANARY)
    check_logits(*given_operands, out)
    assert frame_is_untouched(out, CANARY)


@settings(max_examples=80)
@given(operands(), st.sampled_from([None, 0.5, 30.0]), st.booleans(), st.data())
def test_score(given_operands, tanh_scale, want_entropy, data):
    hidden, weight, _, _ = given_operands
    columns = weight.shape[0]
    edges = sorted({0, columns - 1, min(columns - 1, 63), min(columns - 1, 64), min(columns - 1, 2048)})
    choice = data.draw(st.lists(st.sampled_from(edges), min_size=1, max_size=6))
    ids = torch.tensor(choice).repeat(hidden.shape[0])[: hidden.shape[0]]
    check_score(*given_operands, tanh_scale, ids, want_entropy)


@settings(max_examples=80)
@given(operands(), st.integers(0, 5), st.integers(0, 40))
def test_backward(given_operands, left, right):
    hidden, weight, _, scale = given_operands
    gradient = inside(torch.randn(hidden.shape[0], weight.shape[0]), 1, right, left, torch.nan)
    out = inside(torch.zeros_like(hidden, dtype=torch.float32), 2, left, right, CANARY)
    check_backward(gradient, weight, scale, out)
    assert frame_is_untouched(out, CANARY)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_columns_near_the_end_of_a_block(columns, dtype):
    hidden, weight = torch.randn(5, 11).to(dtype), torch.randn(columns, 11).to(dtype)
    weight[-1] *= 3
    bias, out = torch.randn(columns), inside(torch.zeros(5, columns), 1, 1, 3, CANARY)
    check_logits(hidden, weight, bias, 1.0, out)
    assert frame_is_untouched(out, CANARY)
    check_score(hidden, weight, bias, 1.0, None, torch.tensor([0, columns - 1, columns // 2, 0, columns - 1]), True)
    check_backward(torch.randn(5, columns), weight, 1.0, torch.empty(5, 11))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_rows_near_the_end_of_a_panel(rows, dtype):
    hidden, weight = torch.randn(rows, 130).to(dtype), (torch.randn(70, 130) / 5).to(dtype)
    out = inside(torch.zeros(rows, 70), 1, 1, 3, CANARY)
    check_logits(hidden, weight, None, 1.0, out)
    assert frame_is_untouched(out, CANARY)
    check_score(hidden, weight, None, 1.0, 3.0, torch.arange(rows) % 70, True)
    back = inside(torch.zeros(rows, 130), 1, 1, 3, CANARY)
    check_backward(torch.randn(rows, 70), weight, 0.5, back)
    assert frame_is_untouched(back, CANARY)


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_near_the_end_of_a_panel(width):
    hidden, weight = torch.randn(50, width), torch.randn(777, width)
    check_logits(hidden, weight, None, 1.0, torch.empty(50, 777))
    out = inside(torch.zeros(50, width), 1, 2, 3, CANARY)
    check_backward(torch.randn(50, 777), weight, -0.5, out)
    assert frame_is_untouched(out, CANARY)


@pytest.mark.parametrize("columns", [8800, 8801, 9000, 8193, 8767])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_stores(columns, dtype):
    """Large aligned tiles are written past the cache; the result is the same, and so is what lies around it."""
    rows, width = 131, 9
    hidden, weight, bias = (
        torch.randn(rows, width).to(dtype),
        torch.randn(columns, width).to(dtype),
        torch.randn(columns),
    )
    stride = (columns + 15) // 16 * 16 + 16
    whole = torch.full((rows + 2, stride), CANARY)
    out = whole[1 : 1 + rows, :columns]
    assert rows * stride >= 1 << 20
    assert out.data_ptr() % 64 == 0
    check_logits(hidden, weight, bias, 1.5, out)
    assert frame_is_untouched(out, CANARY)
    plain = inside(torch.zeros(rows, columns), 1, 1, 0, CANARY)
    extension.operations().linear_logits(hidden, weight, bias, 1.5, plain)
    assert torch.equal(out, plain)


@pytest.mark.parametrize("width", [576, 48, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_weight_gradient(width, dtype):
    """Rows on cache lines are written past the cache the first time; what lies around them is as it was."""
    rows, columns = 33, 1300
    hidden, gradient = torch.randn(rows, width).to(dtype), torch.randn(rows, columns).bfloat16().float()
    whole = torch.full((columns + 2, (width + 15) // 16 * 16 + 16), CANARY)
    out = whole[1 : 1 + columns, :width]
    assert out.data_ptr() % 64 == 0
    plain = inside(torch.zeros(columns, width), 1, 1, 0, CANARY)
    for target in (out, plain):
        extension.operations().linear_weight_gradient(gradient, hidden, 0.5, False, target)
        assert frame_is_untouched(target, CANARY)
    assert torch.equal(out, plain)
    exact, native = (0.5 * torch.mm(gradient.to(d).T, hidden.to(d)) for d in (torch.float64, torch.float32))
    assert_accurate("weight gradient", out, exact, native)


def test_strides_that_skip_rows():
    hidden, weight = torch.randn(40, 33), torch.randn(300, 33)
    gradient, back, out = torch.randn(40, 150), torch.full((40, 33), CANARY), torch.full((40, 150), CANARY)
    check_logits(hidden[::2], weight[::2], None, 1.0, out[::2])
    check_backward(gradient[::2], weight[::2], 1.0, back[::2])
    assert (out[1::2] == CANARY).all()
    assert (back[1::2] == CANARY).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row_and_column(dtype):
    hidden, weight = torch.randn(50, 20).to(dtype), torch.randn(100, 20).to(dtype)
    hidden[49, 3] = torch.nan
    weight[99, 4] = torch.nan
    out = torch.empty(50, 100)
    extension.operations().linear_logits(hidden, weight, None, 1.0, out)
    expected = torch.zeros(50, 100, dtype=torch.bool)
    expected[49] = expected[:, 99] = True
    assert torch.equal(out.isnan(), expected)
    # In a sum over the vocabulary it shows in every row; in one row of hidden states, only there.
    scores = [torch.empty(50) for _ in range(3)]
    ids = torch.zeros(50, dtype=torch.int64)
    extension.operations().linear_score(hidden, weight, None, 1.0, None, ids, *scores)
    assert scores[0].isnan().all()
    assert scores[2].isnan().all()
    extension.operations().linear_score(hidden, weight[:99], None, 1.0, None, ids, *scores)
    for values in scores:
        assert values.isnan().nonzero().flatten().tolist() == [49]


def test_columns_masked_by_the_bias():
    """A bias of -3e38 takes a column out of every sum, also a whole block, a whole piece, and the first ones."""
    hidden, weight, bias = torch.randn(20, 8), torch.randn(5000, 8), torch.zeros(5000)
    keep = torch.cat([torch.arange(2050, 2100), torch.arange(4990, 4995)])
    bias.fill_(-3e38)[keep] = 0.0
    ids = keep[torch.arange(20)]
    ours = [torch.empty(20) for _ in range(3)]
    extension.operations().linear_score(hidden, weight, bias, 1.0, None, ids, *ours)
    place = torch.arange(20)
    exact, native = (
        scores_in(dtype, hidden, weight[keep], None, 1.0, None, place) for dtype in (torch.float64, torch.float32)
    )
    for name, *tensors in zip(("logsumexp", "target logit", "entropy"), ours, exact, native, strict=True):
        assert_accurate(name, *tensors)


@pytest.mark.parametrize("tanh_scale", [None, 5.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["hidden", "weight", "bias"])
def test_what_is_not_finite_makes_nan_of_the_rows_it_reaches(where, value, tanh_scale):
    """Also minus infinity, which would pass for a probability of zero, and under a soft cap, which makes a number of
    any infinity. A hidden state reaches its own row, a weight and a bias all rows."""
    hidden, weight, bias = torch.randn(20, 8), torch.randn(5000, 8), torch.randn(5000)
    {"hidden": hidden[7], "weight": weight[4099], "bias": bias[4099:]}[where][:1] = value
    ours = [torch.zeros(20) for _ in range(3)]
    extension.operations().linear_score(hidden, weight, bias, 0.5, tanh_scale, torch.arange(20), *ours)
    expected = torch.arange(20) == 7 if where == "hidden" else torch.ones(20, dtype=torch.bool)
    assert torch.equal(ours[0].isnan(), expected)
    assert torch.equal(ours[2].isnan(), expected)


@pytest.mark.parametrize("apart", [-100.0, -30.0, -5.0, 5.0, 30.0, 100.0])
def test_scores_of_pieces_whose_logits_are_apart(apart):
    """A piece of work has its own largest logit; the second and third one's are `apart` from the first one's."""
    hidden, weight, bias = torch.randn(20, 8), torch.randn(5000, 8), torch.randn(5000)
    bias[2048:] += apart
    check_score(hidden, weight, bias, 1.0, None, torch.arange(20) * 249, True)


def test_large_logits():
    hidden, weight = torch.randn(20, 16) * 100, torch.randn(3000, 16) * 10
    check_score(hidden, weight, None, 1.0, None, torch.arange(20), True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_widened_right(dtype):
    """As the one element of a weight row: infinities, NaN and subnormal numbers included."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    out = torch.empty(1, 1 << 16)
    extension.operations().linear_logits(torch.ones(1, 1, dtype=dtype), values.unsqueeze(1), None, 1.0, out)
    torch.testing.assert_close(out[0], values.float(), rtol=0, atol=0, equal_nan=True)
    extension.operations().linear_logits(values.unsqueeze(1), torch.ones(1, 1, dtype=dtype), None, 1.0, out.view(-1, 1))
    torch.testing.assert_close(out[0], values.float(), rtol=0, atol=0, equal_nan=True)


def test_bad_arguments():
    ops = extension.operations()
    hidden, weight, out, back = torch.zeros(4, 6), torch.zeros(9, 6), torch.zeros(4, 9), torch.zeros(4, 6)
    ids, rows = torch.zeros(4, dtype=torch.int64), [torch.zeros(4) for _ in range(3)]
    cases = [
        (r"weight must have shape \[V, 6\], got \[9, 5\]", "linear_logits", (hidden, weight[:, :5], None, 1.0, out)),
        (r"hidden must have contiguous rows", "linear_logits", (torch.zeros(6, 4).T, weight, None, 1.0, out)),
        (r"hidden must have two dimensions, got 1", "linear_logits", (torch.zeros(4), weight, None, 1.0, out)),
        (r"got float64", "linear_logits", (hidden.double(), weight.double(), None, 1.0, out)),
        (r"weight must be float32", "linear_logits", (hidden, weight.int(), None, 1.0, out)),
        (r"out must have shape \[4, 9\]", "linear_logits", (hidden, weight, None, 1.0, torch.zeros(4, 8))),
        (r"out must be float32", "linear_logits", (hidden, weight, None, 1.0, out.bfloat16())),
        (r"out must have contiguous rows", "linear_logits", (hidden, weight, None, 1.0, torch.zeros(9, 4).T)),
        (r"bias must be contiguous \[9\]", "linear_logits", (hidden, weight, torch.zeros(8), 1.0, out)),
        (r"bias must be float32", "linear_logits", (hidden, weight, torch.zeros(9).half(), 1.0, out)),
        (
            r"target_ids must be in \[0, 9\), got 9 at",
            "linear_score",
            (hidden, weight, None, 1.0, None, ids + 9, *rows),
        ),
        (r"target_ids must be in \[0, 9\), got -1", "linear_score", (hidden, weight, None, 1.0, None, ids - 1, *rows)),
        (r"target_ids has the wrong dtype", "linear_score", (hidden, weight, None, 1.0, None, ids.int(), *rows)),
        (
            r"logsumexp must have shape \[4\]",
            "linear_score",
            (hidden, weight, None, 1.0, None, ids, rows[0][:3], *rows[1:]),
        ),
        (r"gradient must have shape \[rows, 9\], got \[4, 8\]", "linear_backward", (out[:, :8], weight, 1.0, back)),
        (r"out must have shape \[4, 6\]", "linear_backward", (out, weight, 1.0, back[:3])),
        (r"gradient must be float32", "linear_backward", (out.half(), weight, 1.0, back)),
        (r"out must have shape \[9, 6\]", "linear_weight_gradient", (out, hidden, 1.0, False, weight[:8])),
        (r"hidden must have shape \[4, H\]", "linear_weight_gradient", (out, hidden[:3], 1.0, False, weight)),
        (r"at least one row", "linear_weight_gradient", (out[:0], hidden[:0], 1.0, False, weight)),
    ]
    for message, name, arguments in cases:
        with pytest.raises(RuntimeError, match=message):
            getattr(ops, name)(*arguments)
