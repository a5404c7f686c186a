"""The C++ backend's divergence of complete rows and its gradient, against the reference in float64: at most twice the
error of PyTorch in float32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.native_tiles import (
    CANARY,
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
from tests.support import assert_accurate, max_error
from unisd_kernels.backends import extension
from unisd_kernels.backends.base import LogitPair
from unisd_kernels.backends.native import _NUM_STATISTICS
from unisd_kernels.backends.torch import TorchBackend
from unisd_kernels.backends.transform import LogitTransform
from unisd_kernels.reference.divergence import divergence_from_log_probs

pytestmark = needs_library

BETAS = [0.0, 1.0, 0.5, 0.05, 0.999]
NAMES = ("divergence", "student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy")


def divergence_in(dtype, student, teacher, cap, teacher_cap, ids, beta, weight, logprob_weight):
    """Statistics, [rows] each, and the gradient [rows, columns], by dense formulas in `dtype`."""
    x = student.to(dtype, copy=True).requires_grad_()
    a, b = logits(x, cap).log_softmax(-1), logits(teacher.to(dtype), teacher_cap).log_softmax(-1)
    divergence = divergence_from_log_probs(a, b, beta)
    total = (divergence if weight is None else weight.to(dtype) * divergence).sum()
    if logprob_weight is not None:
        total = total + (logprob_weight.to(dtype) * picked(a, ids)).sum()
    statistics = (divergence, picked(a, ids), picked(b, ids), entropy_of(a), entropy_of(b))
    return [value.detach() for value in statistics], gradient_of(total, x, cap)


def torch_tiles(student, teacher, cap, teacher_cap, ids, beta, weight, logprob_weight):
    """What `divergence_in` gives, by the PyTorch backend in float32."""
    tile = student.clone()
    transforms = LogitTransform(1.0, cap, 1.0), LogitTransform(1.0, teacher_cap, 1.0)
    logits = LogitPair(tile, teacher.clone(), None)
    rows, saved = TorchBackend().divergence_of_logits(logits, *transforms, ids, beta, True, False)
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
    teacher_is_delta = torch.ones(rows, dtype=torch.bool) if delta else None
    ops.tile_divergence_(*tiles, cap, teacher_cap, teacher_is_delta, ids, beta, want_entropy, statistics)
    before = tiles[1].clone(), statistics.clone()
    ops.tile_divergence_gradient_(*tiles, cap, teacher_is_delta, ids, beta, statistics, weight, logprob_weight)
    assert torch.equal(tiles[1].nan_to_num(), before[0].nan_to_num())
    assert torch.equal(statistics.nan_to_num(), before[1].nan_to_num())
    assert all(frame_is_untouched(tile, CANARY) for tile in tiles)
    if weight is None and logprob_weight is None:
        # Both in one, the same bits.
        joint = inside(student, 1, *paddings, CANARY), inside(teacher, 1, *reversed(paddings), CANARY)
        together = torch.full_like(statistics, torch.nan)
        ops.tile_divergence_(*joint, cap, teacher_cap, teacher_is_delta, ids, beta, want_entropy, together, True)
        assert torch.equal(together.view(torch.int32), statistics.view(torch.int32))
        assert torch.equal(joint[0].nan_to_num(), tiles[0].nan_to_num())
        assert torch.equal(joint[0].isnan(), tiles[0].isnan())
        assert all(frame_is_untouched(tile, CANARY) for tile in joint)
    return list(statistics[:5]), tiles[0]


@settings(max_examples=200)
@given(
    shape=st.tuples(st.integers(0, 7), COLUMNS_STRATEGY),
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
