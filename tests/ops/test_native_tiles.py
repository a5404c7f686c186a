"""The CPU operations on tiles against float64 formulas, held to twice the error of PyTorch in float32."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.test_native_products import frame_is_untouched, inside
from tests.support import FLOOR, assert_accurate, max_error
from unisd_kernels.backends import extension
from unisd_kernels.backends.base import LogitPair, ScoreGrads, Scores
from unisd_kernels.backends.native import _NUM_STATISTICS
from unisd_kernels.backends.torch import TorchBackend
from unisd_kernels.backends.transform import LogitTransform

pytestmark = pytest.mark.skipif(
    extension.cpu_unavailable() is not None, reason=f"no CPU library: {extension.cpu_unavailable()}"
)

INF = math.inf
# A mask that is a number: next to nothing in float32, and below 0 by more than any logit.
MASKED = -3e38
# Larger than any logit: a read beyond a row would show in the row's maximum.
CANARY = 12345.0
BETAS = [0.0, 1.0, 0.5, 0.05, 0.999]
NAMES = ("divergence", "student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy")
COLUMNS = sorted({n + d for n in (8, 16, 24, 32, 64, 1024, 2048, 4096) for d in (-1, 0, 1)} | {1, 2, 1040, 5000})
columns_strategy = st.one_of(st.sampled_from(COLUMNS), st.integers(1, 5000))
cap_strategy = st.sampled_from([None, None, 0.5, 3.0, 30.0])


def make_tile(rows: int, columns: int, seed: int, cap: float | None = None) -> torch.Tensor:
    """Before the cap. The first and the last columns have much of the probability, so that their errors show."""
    tile = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 3
    tile[:, 0] += 5
    tile[:, -1] += 5
    return tile if cap is None else tile / 5


def make_ids(rows: int, columns: int, seed: int) -> torch.Tensor:
    ids = torch.randint(0, columns, (rows,), generator=torch.Generator().manual_seed(seed))
    ids[:1] = columns - 1
    return ids


def logits(tile: torch.Tensor, cap: float | None) -> torch.Tensor:
    return tile if cap is None else cap * torch.tanh(tile)


def picked(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return values.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def entropy_of(logprobs: torch.Tensor) -> torch.Tensor:
    return -(logprobs.exp() * logprobs).sum(-1)


def divergence_of(a: torch.Tensor, b: torch.Tensor, beta: float) -> torch.Tensor:
    """From log-probabilities of the student and the teacher."""
    if beta == 0.0:
        return (b.exp() * (b - a)).sum(-1)
    if beta == 1.0:
        return (a.exp() * (a - b)).sum(-1)
    m = torch.logaddexp(a + math.log1p(-beta), b + math.log(beta))
    return beta * (b.exp() * (b - m)).sum(-1) + (1 - beta) * (a.exp() * (a - m)).sum(-1)


def gradient_of(total: torch.Tensor, tile: torch.Tensor, cap: float | None) -> torch.Tensor:
    """With respect to `a x / tau`, of which the tile is 1 / `cap`."""
    return torch.autograd.grad(total, tile)[0].detach() / (1.0 if cap is None else cap)


def assert_all_accurate(names, ours, exact, native) -> None:
    for name, *tensors in zip(names, ours, exact, native, strict=True):
        assert_accurate(name, *tensors)


# Scores of a part of the vocabulary.


def scores_in(dtype, tile, cap, ids):
    z = logits(tile.to(dtype), cap)
    return z.logsumexp(-1), picked(z, ids), entropy_of(z.log_softmax(-1))


def run_score(tile, cap, ids, cuts=(), want_entropy=True):
    rows, columns = tile.shape
    ours = [torch.full((rows,), -INF), torch.full((rows,), torch.nan), torch.zeros(rows)]
    edges = [0, *cuts, columns]
    for begin, end in itertools.pairwise(edges):
        part = inside(tile[:, begin:end], 1, begin % 3, end % 5, CANARY)
        before = part.clone()
        extension.operations().tile_score_(part, cap, ids, begin, ours[0], ours[1], ours[2] if want_entropy else None)
        assert torch.equal(part.nan_to_num(), before.nan_to_num())
    return ours if want_entropy else ours[:2]


@settings(max_examples=60)
@given(st.integers(0, 7), columns_strategy, cap_strategy, st.booleans(), st.integers(0, 1000))
def test_score(rows, columns, cap, want_entropy, seed):
    tile, ids = make_tile(rows, columns, seed, cap), make_ids(rows, columns, seed)
    ours = run_score(tile, cap, ids, want_entropy=want_entropy)
    exact, native = (scores_in(dtype, tile, cap, ids)[: len(ours)] for dtype in (torch.float64, torch.float32))
    assert_all_accurate(("logsumexp", "target logit", "entropy")[: len(ours)], ours, exact, native)


@settings(max_examples=60)
@given(columns_strategy, cap_strategy, st.data())
def test_score_of_any_split_is_that_of_the_whole(columns, cap, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, columns), max_size=5)))
    tile, ids = make_tile(5, columns, columns, cap), make_ids(5, columns, columns)
    whole, parts = run_score(tile, cap, ids), run_score(tile, cap, ids, cuts)
    assert torch.equal(whole[1], parts[1])
    exact = scores_in(torch.float64, tile, cap, ids)
    for index in (0, 2):
        largest = float(exact[index].abs().max())
        assert max_error(parts[index], exact[index]) <= max_error(whole[index], exact[index]) + 2e-6 * max(largest, 0.1)


def test_score_without_targets():
    tile = make_tile(3, 100, 0)
    logsumexp = torch.full((3,), -INF)
    extension.operations().tile_score_(tile, None, None, 0, logsumexp, None, None)
    torch.testing.assert_close(logsumexp, tile.logsumexp(-1))


def test_score_of_masked_columns():
    """Whole vectors, blocks and tiles of them: they add nothing, wherever they are."""
    tile = make_tile(4, 5000, 0)
    keep = torch.zeros(5000, dtype=torch.bool)
    keep[torch.tensor([1500, 1501, 4000, 4998])] = True
    tile[:, ~keep] = MASKED
    ids = torch.tensor([1500, 1501, 4000, 0])
    expected = tile[:, keep].double()
    for cuts in ((), (1000,), (1000, 2000, 4999)):
        logsumexp, target, entropy = run_score(tile, None, ids, cuts)
        torch.testing.assert_close(logsumexp, expected.logsumexp(-1).float(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(entropy, entropy_of(expected.log_softmax(-1)).float(), rtol=2e-6, atol=2e-6)
        assert torch.equal(target, picked(tile, ids))


# Softmax and the gradient of log-probabilities.


def softmax_in(dtype, tile, cap, ids):
    x = tile.to(dtype, copy=True).requires_grad_()
    z = logits(x, cap)
    logsumexp = z.logsumexp(-1)
    return gradient_of(logsumexp.sum(), x, cap), logsumexp.detach(), picked(z, ids).detach()


@settings(max_examples=60)
@given(st.integers(0, 7), columns_strategy, cap_strategy, st.integers(0, 1000))
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
    columns_strategy,
    cap_strategy,
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


# Divergences.


def divergence_in(dtype, student, teacher, cap, teacher_cap, ids, beta, weight, logprob_weight):
    """Statistics and the gradient, dense."""
    x = student.to(dtype, copy=True).requires_grad_()
    a, b = logits(x, cap).log_softmax(-1), logits(teacher.to(dtype), teacher_cap).log_softmax(-1)
    divergence = divergence_of(a, b, beta)
    total = (divergence if weight is None else weight.to(dtype) * divergence).sum()
    if logprob_weight is not None:
        total = total + (logprob_weight.to(dtype) * picked(a, ids)).sum()
    statistics = (divergence, picked(a, ids), picked(b, ids), entropy_of(a), entropy_of(b))
    return [value.detach() for value in statistics], gradient_of(total, x, cap)


def torch_tiles(student, teacher, cap, teacher_cap, ids, beta, weight, logprob_weight):
    """The same by the PyTorch backend, in float32."""
    tile = student.clone()
    transforms = LogitTransform(1.0, cap, 1.0), LogitTransform(1.0, teacher_cap, 1.0)
    logits = LogitPair(tile, teacher.clone(), None)
    rows, saved = TorchBackend().divergence_of_logits(logits, *transforms, ids, beta, True)
    TorchBackend().divergence_of_logits_backward(saved, ids, weight, logprob_weight)
    return list(rows), tile


def run_divergence(
    student,
    teacher,
    cap,
    teacher_cap,
    delta,
    ids,
    beta,
    weight,
    logprob_weight,
    want_entropy=True,
    paddings=(0, 0),
):
    rows = student.shape[0]
    tiles = inside(student, 1, *paddings, CANARY), inside(teacher, 1, *reversed(paddings), CANARY)
    statistics = torch.full((_NUM_STATISTICS, rows), torch.nan)
    ops = extension.operations()
    is_difference = torch.ones(rows, dtype=torch.bool) if delta else None
    ops.tile_divergence_(*tiles, cap, teacher_cap, is_difference, ids, beta, want_entropy, statistics)
    before = tiles[1].clone(), statistics.clone()
    ops.tile_divergence_gradient_(*tiles, cap, is_difference, ids, beta, statistics, weight, logprob_weight)
    assert torch.equal(tiles[1].nan_to_num(), before[0].nan_to_num())
    assert torch.equal(statistics.nan_to_num(), before[1].nan_to_num())
    assert all(frame_is_untouched(tile, CANARY) for tile in tiles)
    return list(statistics[:5]), tiles[0]


@settings(max_examples=200)
@given(
    shape=st.tuples(st.integers(0, 7), columns_strategy),
    kind=st.sampled_from(["plain", "plain", "capped", "one cap", "delta"]),
    beta=st.sampled_from(BETAS),
    distance=st.sampled_from([0.3, 3.0]),
    with_targets=st.booleans(),
    want_entropy=st.booleans(),
    with_weights=st.tuples(st.booleans(), st.booleans()),
    paddings=st.tuples(st.integers(0, 5), st.integers(0, 20)),
    seed=st.integers(0, 1000),
)
def test_divergence(shape, kind, beta, distance, with_targets, want_entropy, with_weights, paddings, seed):
    rows, columns = shape
    cap = {"capped": 3.0, "one cap": 30.0}.get(kind)
    teacher_cap = 20.0 if kind == "capped" else None
    student = make_tile(rows, columns, seed, cap)
    difference = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1)) * distance
    # Exact: the formula gets z_s + delta in float64 in the one case, and the rounded sum in the other.
    teacher = difference if kind == "delta" else make_tile(rows, columns, seed, teacher_cap) + difference
    ids = make_ids(rows, columns, seed)
    weight = torch.randn(rows) if with_weights[0] else None
    logprob_weight = torch.randn(rows) if with_weights[1] and with_targets else None

    ours, gradient = run_divergence(
        student,
        teacher,
        cap,
        teacher_cap,
        kind == "delta",
        ids if with_targets else None,
        beta,
        weight,
        logprob_weight,
        want_entropy,
        paddings,
    )
    full_teacher = student.double() + difference.double() if kind == "delta" else teacher
    rest = cap, teacher_cap, ids, beta, weight, logprob_weight
    exact, exact_gradient = divergence_in(torch.float64, student, full_teacher, *rest)
    native, native_gradient = torch_tiles(student, full_teacher.float(), *rest)
    assert all(values.isfinite().all() for values in ours)
    assert (ours[0] >= 0).all()
    asked = [True, with_targets, with_targets, want_entropy, want_entropy]
    for wanted, name, *tensors in zip(asked, NAMES, ours, exact, native, strict=True):
        if wanted:
            assert_accurate(name, *tensors)
    assert_accurate("gradient", gradient, exact_gradient, native_gradient)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("beta", BETAS)
def test_small_divergences_keep_their_digits(beta, delta):
    """D near 1e-5 and below, where dense float32 is off by percents. With the difference given instead of the teacher's
    logits there is no rounding to cancel, and the gradient keeps its digits too."""
    student = torch.randn(16, 20000) * 3
    difference = torch.randn(16, 20000) * 5e-3
    teacher = student + difference
    full = student.double() + difference.double() if delta else teacher
    rest = torch.zeros(16, dtype=torch.int64), beta, None, None
    ours, gradient = run_divergence(student, difference if delta else teacher, None, None, delta, *rest)
    exact, exact_gradient = divergence_in(torch.float64, student, full, None, None, *rest)
    native, _ = torch_tiles(student, full.float(), None, None, *rest)
    assert 1e-9 < float(exact[0].median()) < 1e-4
    error = (ours[0].double() - exact[0]).abs().median()
    if beta in (0.0, 1.0):
        assert error < (1e-6 if delta else 1e-5) * exact[0].median()
    else:
        # A mixture close to one side is of third order in places; what is left is absolute.
        assert error <= 2 * (native[0].double() - exact[0]).abs().median() + 5e-11
    largest = exact_gradient.abs().amax(-1)
    gradient_error = (gradient.double() - exact_gradient).abs().amax(-1)
    assert (gradient_error / largest).median() < (2e-6 if delta else 1e-4)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("beta", BETAS)
def test_identical_tiles_have_no_divergence(beta, delta, cap):
    if delta and cap is not None:
        cap = None
    student = make_tile(5, 3001, 0, cap)
    teacher = torch.zeros_like(student) if delta else student.clone()
    ours, gradient = run_divergence(student, teacher, cap, cap, delta, None, beta, None, None)
    assert ours[0].abs().max() <= 1e-7
    assert gradient.abs().max() <= 1e-7
    if not delta:
        assert not ours[0].any()
        assert not gradient.any()
    assert max_error(ours[3], ours[4]) <= 2e-6 * float(ours[3].max())


@pytest.mark.parametrize("columns", [17, 3000])
@pytest.mark.parametrize("beta", BETAS)
def test_large_logits(beta, columns):
    """+-1e3: most probabilities underflow, in one tile or in both."""
    signs = torch.where(torch.rand(6, columns) < 0.5, -1e3, 1e3)
    student = signs + torch.randn(6, columns)
    teacher = torch.where(torch.rand(6, columns) < 0.1, -signs, signs) + torch.randn(6, columns)
    student[5], teacher[5] = -1e3, -1e3
    student[5, 3], teacher[5, 3] = 1e3, 1e3
    rest = torch.arange(6), beta, torch.randn(6), torch.randn(6)
    ours, gradient = run_divergence(student, teacher, None, None, False, *rest)
    exact, exact_gradient = divergence_in(torch.float64, student, teacher, None, None, *rest)
    native, native_gradient = divergence_in(torch.float32, student, teacher, None, None, *rest)
    assert_all_accurate(NAMES, ours, exact, native)
    assert_accurate("gradient", gradient, exact_gradient, native_gradient)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("delta", [False, True])
def test_columns_masked_in_both(beta, delta):
    student, difference = make_tile(4, 3000, 0), torch.randn(4, 3000)
    keep = torch.rand(3000) < 0.4
    keep[:1100], keep[2999], keep[1500] = False, False, True
    student[:, ~keep] = MASKED
    difference[:, ~keep] = 0.0
    teacher = difference if delta else student + difference
    kept = torch.full((4,), int(keep[:1500].sum()))
    weight = torch.randn(4)
    ours, gradient = run_divergence(student, teacher, None, None, delta, torch.full((4,), 1500), beta, weight, weight)
    small = student[:, keep]
    full = small.double() + difference[:, keep].double() if delta else teacher[:, keep]
    rest = None, None, kept, beta, weight, weight
    exact, exact_gradient = divergence_in(torch.float64, small, full, *rest)
    native, native_gradient = torch_tiles(small, full.float(), *rest)
    assert_all_accurate(NAMES, ours, exact, native)
    assert not gradient[:, ~keep].any()
    assert_accurate("gradient", gradient[:, keep], exact_gradient, native_gradient)


NOT_FINITE = [math.nan, INF, -INF]


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("which", ["student", "teacher", "delta", "student of delta", "student cap", "teacher cap"])
@pytest.mark.parametrize("column", [0, 3000])
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
def test_a_logit_that_is_not_finite_makes_nan_of_its_row_only(beta, column, which, value):
    student, teacher = make_tile(3, 3001, 0) / 5, make_tile(3, 3001, 1) / 5
    (student if which.startswith("student") else teacher)[1, column] = value
    ids, cap = torch.full((3,), 5), 5.0 if which.endswith("cap") else None
    weight = torch.ones(3)
    ours, gradient = run_divergence(student, teacher, cap, cap, "delta" in which, ids, beta, weight, weight)
    for values in ours:
        assert values.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(-1).tolist() == [False, True, False]
    assert gradient[::2].isfinite().all()


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("column", [0, 16, 2000, 3000])
def test_a_logit_that_is_not_finite_in_scores_and_softmax(column, value):
    tile, ids = make_tile(3, 3001, 0), torch.full((3,), 5)
    tile[1, column] = value
    for cap in (None, 3.0):
        logsumexp, _, entropy = run_score(tile, cap, ids, (1000,))
        softmax, rows = tile.clone(), [torch.empty(3), torch.empty(3)]
        extension.operations().tile_softmax_(softmax, cap, ids, *rows)
        for values in (logsumexp, entropy, rows[0], softmax.sum(-1)):
            assert values.isnan().tolist() == [False, True, False]


# Scaling of rows.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(st.integers(0, 7), columns_strategy, st.integers(0, 1000))
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
        [narrow, middle, torch.nextafter(middle, torch.tensor(INF)), middle.nextafter(torch.tensor(-INF))]
    )
    out = torch.empty(1, values.numel(), dtype=dtype)
    extension.operations().scale_rows(values.unsqueeze(0), torch.ones(1), out)
    torch.testing.assert_close(out[0], values.to(dtype), rtol=0, atol=0, equal_nan=True)


# The list of operations, and what each refuses.


def arguments():
    """By operation: small arguments that it takes."""
    rows, columns = 3, 20
    ids, vector = torch.arange(rows), torch.full((rows,), 0.5)

    def tile():
        return make_tile(rows, columns, 0)

    def new():
        return torch.zeros(rows)

    statistics, marks = torch.empty(_NUM_STATISTICS, rows), torch.tensor([True, False, True])
    extension.operations().tile_divergence_(tile(), tile() + 1, 2.0, None, None, ids, 0.5, True, statistics)
    hidden, weight = torch.randn(rows, 5), torch.randn(columns, 5)
    return {
        "tile_score_": (tile(), 2.0, ids, 0, torch.full((rows,), -INF), new(), new()),
        "tile_softmax_": (tile(), None, ids, new(), new()),
        "tile_logprob_gradient_": (tile(), None, vector * 10, ids, vector, vector, vector, vector),
        "tile_divergence_": (tile(), tile() + 1, None, None, marks, ids, 0.5, True, torch.empty(_NUM_STATISTICS, rows)),
        "tile_divergence_gradient_": (tile(), tile() + 1, None, marks, ids, 0.5, statistics, vector, vector),
        "scale_rows": (tile(), vector, torch.empty(rows, columns, dtype=torch.bfloat16)),
        "ema_update_": ([torch.randn(4), torch.randn(3)], [torch.randn(4), torch.randn(3)], 0.9, [], False, 1),
        "linear_score": (hidden, weight, torch.randn(columns), 1.0, None, ids, new(), new(), new()),
        "linear_logits": (hidden, weight, None, 1.0, torch.empty(rows, columns)),
        "linear_backward": (tile(), weight, 1.0, torch.empty(rows, 5)),
        "vector_math": ("exp", vector, new()),
    }


def test_the_list_of_operations():
    source = (Path(__file__).parents[2] / "csrc" / "ops.cpp").read_text()
    assert tuple(re.findall(r'm\.def\(\s*"(\w+)\(', source)) == extension.OPERATIONS
    extension.operations()
    for name in extension.OPERATIONS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"unisd::{name}", "CPU"), name
        assert not getattr(torch.ops.unisd, name).default._schema.returns
    assert set(arguments()) == set(extension.OPERATIONS)


@pytest.mark.parametrize("name", extension.OPERATIONS)
def test_opcheck(name):
    """Schema (what is mutated), fake implementation, and behaviour under torch.compile."""
    operation = getattr(extension.operations(), name).default
    results = torch.library.opcheck(operation, arguments()[name])
    assert set(results.values()) == {"SUCCESS"}


def altered(name: str, **changes):
    """The arguments with some replaced, by position (`_3`)."""
    values = list(arguments()[name])
    for position, value in changes.items():
        values[int(position[1:])] = value
    return values


TILE, IDS = torch.zeros(3, 20), torch.arange(3)
BAD = [
    ("tile_score_", {"_0": TILE.double()}, "tile must be float32"),
    ("tile_score_", {"_0": TILE[0]}, "tile must have two dimensions, got 1"),
    ("tile_score_", {"_0": torch.zeros(20, 3).T}, "tile must have contiguous rows, got a stride of 3"),
    ("tile_score_", {"_4": torch.zeros(4)}, r"logsumexp must have shape \[3\]"),
    ("tile_score_", {"_4": torch.zeros(3).double()}, "logsumexp has the wrong dtype"),
    ("tile_score_", {"_5": torch.zeros(6)[::2]}, "target_logits must be contiguous"),
    ("tile_score_", {"_2": IDS.int()}, "target_ids has the wrong dtype"),
    ("tile_score_", {"_2": IDS[:2]}, r"target_ids must have shape \[3\]"),
    ("tile_softmax_", {"_2": IDS + 18}, r"target_ids must be in \[0, 20\), got 20 at position 2"),
    ("tile_softmax_", {"_2": IDS - 1}, r"target_ids must be in \[0, 20\), got -1 at position 0"),
    ("tile_softmax_", {"_0": TILE.bfloat16()}, "tile must be float32"),
    ("tile_logprob_gradient_", {"_6": None}, "entropy_weight needs entropy"),
    ("tile_logprob_gradient_", {"_4": torch.zeros(2)}, r"logprob_weight must have shape \[3\]"),
    ("tile_logprob_gradient_", {"_3": IDS * 20}, r"target_ids must be in \[0, 20\), got 20"),
    ("tile_divergence_", {"_1": TILE[:, :19]}, r"teacher must have the student's shape \[3, 20\], got \[3, 19\]"),
    ("tile_divergence_", {"_1": TILE[:2]}, r"teacher must have the student's shape \[3, 20\], got \[2, 20\]"),
    ("tile_divergence_", {"_1": torch.zeros(20, 3).T}, "teacher must have contiguous rows"),
    ("tile_divergence_", {"_0": TILE.half()}, "student must be float32"),
    ("tile_divergence_", {"_3": 2.0}, "only without a soft cap"),
    ("tile_divergence_", {"_5": IDS + 30}, r"target_ids must be in \[0, 20\), got 30"),
    ("tile_divergence_", {"_6": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
    ("tile_divergence_", {"_6": math.nan}, r"beta must be in \[0, 1\]"),
    ("tile_divergence_", {"_8": torch.empty(10, 3)}, r"statistics must be contiguous float32 \[11, 3\]"),
    ("tile_divergence_", {"_8": torch.empty(3, 11).T}, r"statistics must be contiguous float32 \[11, 3\]"),
    ("tile_divergence_", {"_0": TILE[:, :0], "_1": TILE[:, :0], "_5": None}, "at least one column"),
    ("tile_divergence_", {"_4": torch.ones(3)}, "is_difference has the wrong dtype"),
    ("tile_divergence_", {"_4": torch.ones(2, dtype=torch.bool)}, r"is_difference must have shape \[3\]"),
    ("tile_divergence_gradient_", {"_4": None}, "logprob_weight needs target_ids"),
    ("tile_divergence_gradient_", {"_2": 2.0}, "only without a soft cap"),
    ("tile_divergence_gradient_", {"_7": torch.zeros(3, 1)}, r"weight must have shape \[3\]"),
    ("scale_rows", {"_1": torch.zeros(4)}, r"scale must have shape \[3\]"),
    ("scale_rows", {"_2": torch.zeros(3, 19)}, "out must have the shape of rows"),
    ("scale_rows", {"_2": torch.zeros(3, 20, dtype=torch.float64)}, "out must be float32, bfloat16 or float16"),
    ("scale_rows", {"_2": torch.zeros(3, 20, dtype=torch.int32)}, "out must be float32, float64, bfloat16 or float16"),
    ("scale_rows", {"_0": TILE.double()}, "rows must be float32"),
    ("ema_update_", {"_1": [torch.zeros(4)]}, "teacher has 2 tensors but student has 1"),
    ("ema_update_", {"_1": [torch.zeros(4), torch.zeros(4)]}, "tensor 1: teacher has 3 elements but student has 4"),
    ("ema_update_", {"_1": [torch.zeros(8)[::2], torch.zeros(3)]}, "tensor 0 must be contiguous"),
    ("ema_update_", {"_2": 1.5}, r"decay must be in \[0, 1\], got 1.5"),
    ("ema_update_", {"_0": [torch.zeros(4).half(), torch.zeros(3)]}, "tensor 0: a 16-bit teacher needs compensation"),
    ("ema_update_", {"_3": [torch.zeros(4)]}, "compensation has 1 tensors but teacher has 2"),
    ("ema_update_", {"_0": [torch.zeros(4).int(), torch.zeros(3)]}, "teacher must be float32, float64"),
]


@pytest.mark.parametrize(("name", "changes", "message"), BAD)
def test_bad_arguments(name, changes, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(extension.operations(), name)(*altered(name, **changes))
