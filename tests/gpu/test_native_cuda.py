"""The ahead-of-time CUDA operations (csrc/cuda) against float64 on the same numbers: random tiles and the corners.

Needs a GPU and the library: `python csrc/nvcc.py`.
"""

from __future__ import annotations

import pytest
import torch

from csrc import nvcc
from unisd_kernels.backends import extension
from unisd_kernels.reference.divergence import divergence_from_log_probs
from unisd_kernels.reference.ema import ema_update_ as reference_ema_update_

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# The rows of `statistics` (csrc/statistics.h).
D, STUDENT_LOGPROB, TEACHER_LOGPROB, STUDENT_ENTROPY, TEACHER_ENTROPY = range(5)
LOG_RATIO = 10
NUM_STATISTICS = 11
# A mask that is a number.
MASKED = -3e38
BETAS = [0.0, 0.3, 0.5, 1.0]
# Not a multiple of the block or of four, fewer than four, fewer than the block's threads.
COLUMNS = [1, 3, 509, 2048, 5003]
# Of the largest entry. A log-probability of -30 alone is rounded to 2e-6 in float32.
TOLERANCE = 4e-6


@pytest.fixture(scope="module", autouse=True)
def _library():
    reason = extension.cuda_unavailable()
    if reason is None:
        return
    # Nothing may pass over these tests where the library could be there: it was not built, or not for this torch.
    if nvcc.find_nvcc() is not None or nvcc.LIBRARY.exists():
        pytest.fail(f"the CUDA library is not loaded: {reason}\nTo see why: python csrc/nvcc.py")
    pytest.skip(f"{reason}; this machine has no nvcc")


def run(name, *arguments):
    getattr(torch.ops.unisd, name)(*arguments)


def random_tile(rows, columns, std=3.0, padding=0, offset=0):
    """float32 [rows, columns] with `padding` columns between rows, starting `offset` columns off an aligned address."""
    buffer = torch.full((rows * (columns + padding) + offset,), 1e9, device=DEVICE)
    tile = buffer[offset:].view(rows, columns + padding)[:, :columns]
    return tile.copy_(torch.randn(rows, columns) * std)


def vector(rows, value=0.0):
    return torch.full((rows,), value, device=DEVICE)


def logits(tile, tanh_scale):
    return tile if tanh_scale is None else tanh_scale * torch.tanh(tile)


def gradient_of(function, tile, tanh_scale):
    """d function / d (a x / tau) in float64; the tile itself is `a x / c` with a soft cap."""
    leaf = tile.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(function(logits(leaf, tanh_scale)).sum(), leaf)
    return gradient if tanh_scale is None else gradient / tanh_scale


def assert_near(ours, exact, tolerance=TOLERANCE, floor=0.0):
    assert ours.shape == exact.shape
    assert ours.isfinite().all()
    scale = max(float(exact.abs().max()), floor)
    error = float((ours.double() - exact.to(ours.device)).abs().max())
    assert error <= tolerance * scale, f"error {error:.3e} where the largest entry is {scale:.3e}"


def entropy_of(z):
    log_probs = torch.log_softmax(z, -1)
    return -(log_probs.exp() * log_probs).sum(-1)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("tanh_scale", [None, 5.0])
@pytest.mark.parametrize("want_entropy", [False, True])
def test_score_over_tiles(columns, tanh_scale, want_entropy):
    rows = 5
    tile = random_tile(rows, columns, padding=3)
    ids = torch.randint(0, columns, (rows,), device=DEVICE)
    logsumexp, target_logits = vector(rows, -torch.inf), vector(rows)
    entropy = vector(rows) if want_entropy else None
    cut = (2 * columns + 2) // 3
    for first, last in ((0, cut), (cut, columns)):  # the second starts off alignment, and may be empty
        run("tile_score_", tile[:, first:last], tanh_scale, ids, first, logsumexp, target_logits, entropy)
    z = logits(tile.double(), tanh_scale)
    assert_near(logsumexp, z.logsumexp(-1))
    assert_near(target_logits, z.gather(-1, ids[:, None]).squeeze(-1))
    if want_entropy:
        assert_near(entropy, entropy_of(z), floor=1.0)


def test_score_of_masked_tiles():
    tile = random_tile(3, 700)
    tile[:, 100:300] = MASKED
    tile[1, 500:] = MASKED
    logsumexp, entropy = vector(3, -torch.inf), vector(3)
    for first, last in ((100, 300), (0, 100), (300, 500), (500, 700)):  # all masked, also as the first
        run("tile_score_", tile[:, first:last], None, None, first, logsumexp, None, entropy)
    z = tile.double()
    assert_near(logsumexp, z.logsumexp(-1))
    assert_near(entropy, entropy_of(z), floor=1.0)


def test_ids_out_of_range_are_nan_and_touch_nothing_else():
    rows, columns = 4, 100
    ids = torch.tensor([-1, 2**40, 100, 5], device=DEVICE)
    tile = random_tile(rows, columns)
    lse, target = vector(rows, -torch.inf), vector(rows)
    run("tile_score_", tile, None, ids, 0, lse, target, None)
    # An id beyond this tile may lie in a later one, and keeps the initial 0.
    assert target.isnan().tolist() == [True, False, False, False]
    run("tile_softmax_", tile.clone(), None, ids, lse, target)
    assert target.isnan().tolist() == [True, True, True, False]
    weighted = tile.clone()
    run("tile_logprob_gradient_", weighted, None, lse, ids, vector(rows, 1.0), None, None, None)
    assert weighted.isnan().all(-1).tolist() == [True, True, True, False]
    student, teacher = tile.clone(), random_tile(rows, columns)
    statistics = torch.empty(NUM_STATISTICS, rows, device=DEVICE)
    run("tile_divergence_", student, teacher, None, None, None, ids, 0.5, False, statistics)
    assert statistics[D].isfinite().all()
    for statistic in (STUDENT_LOGPROB, TEACHER_LOGPROB):
        assert statistics[statistic].isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("tanh_scale", [None, 5.0])
def test_softmax(columns, tanh_scale):
    rows = 4
    tile = random_tile(rows, columns, padding=1)
    source = tile.clone()
    ids = torch.randint(0, columns, (rows,), device=DEVICE)
    logsumexp, target_logits = vector(rows), vector(rows)
    run("tile_softmax_", tile, tanh_scale, ids, logsumexp, target_logits)
    z = logits(source.double(), tanh_scale)
    assert_near(logsumexp, z.logsumexp(-1))
    assert_near(target_logits, z.gather(-1, ids[:, None]).squeeze(-1))
    assert_near(tile, gradient_of(lambda z: z.logsumexp(-1), source, tanh_scale))


@pytest.mark.parametrize("columns", [3, 2048, 5003])
@pytest.mark.parametrize("tanh_scale", [None, 5.0])
@pytest.mark.parametrize("weights", [(True, True, True), (True, False, False), (False, True, False)])
def test_logprob_gradient(columns, tanh_scale, weights):
    rows = 4
    tile = random_tile(rows, columns, padding=2, offset=1)
    source = tile.clone()
    ids = torch.randint(0, columns, (rows,), device=DEVICE)
    z = logits(source.double(), tanh_scale)
    logsumexp, entropy = z.logsumexp(-1).float(), entropy_of(z).float()
    on_logprob, on_logsumexp, on_entropy = (torch.randn(rows, device=DEVICE) if given else None for given in weights)
    run(
        *("tile_logprob_gradient_", tile, tanh_scale, logsumexp, ids, on_logprob, on_logsumexp),
        *((entropy, on_entropy) if on_entropy is not None else (None, None)),
    )

    def function(z):
        total = 0.0
        if on_logprob is not None:
            total = total + on_logprob * (z.gather(-1, ids[:, None]).squeeze(-1) - z.logsumexp(-1))
        if on_logsumexp is not None:
            total = total + on_logsumexp * z.logsumexp(-1)
        if on_entropy is not None:
            total = total + on_entropy * entropy_of(z)
        return total

    assert_near(tile, gradient_of(function, source, tanh_scale))


def divergence(student, teacher, student_tanh_scale=None, teacher_tanh_scale=None, delta=False, beta=0.5, **options):
    """Statistics and the gradient, both tiles being consumed."""
    ids, weight, logprob_weight = (options.get(name) for name in ("ids", "weight", "logprob_weight"))
    statistics = torch.full((NUM_STATISTICS, student.shape[0]), torch.nan, device=DEVICE)
    is_difference = torch.ones(student.shape[0], dtype=torch.bool, device=DEVICE) if delta else None
    run(
        *("tile_divergence_", student, teacher, student_tanh_scale, teacher_tanh_scale, is_difference, ids, beta),
        *(options.get("want_entropy", False), statistics),
    )
    run(
        *("tile_divergence_gradient_", student, teacher, student_tanh_scale, is_difference, ids, beta, statistics),
        *(weight, logprob_weight),
    )
    return statistics, student


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("form", ["logits", "soft cap", "delta", "small delta"])
def test_divergence(columns, beta, form):
    rows = 4
    delta = form.endswith("delta")
    student = random_tile(rows, columns, std=1.0 if form == "soft cap" else 3.0, padding=1)
    # Another distance to alignment than the student's, for one of the forms.
    teacher = random_tile(
        rows, columns, std=0.1 if form == "small delta" else 2.0, padding=1, offset=1 if form == "logits" else 0
    )
    student_scale, teacher_scale = (7.0, 5.0) if form == "soft cap" else (None, None)
    ids = torch.randint(0, columns, (rows,), device=DEVICE)
    weight, logprob_weight = torch.rand(rows, device=DEVICE), torch.randn(rows, device=DEVICE)

    zs = logits(student.double(), student_scale)
    zt = zs + teacher.double() if delta else logits(teacher.double(), teacher_scale)
    log_student, log_teacher = torch.log_softmax(zs, -1), torch.log_softmax(zt, -1)

    def objective(z):
        log_probs = torch.log_softmax(z, -1)
        d = divergence_from_log_probs(log_probs, log_teacher, beta)
        return weight * d + logprob_weight * log_probs.gather(-1, ids[:, None]).squeeze(-1)

    exact = gradient_of(objective, student, student_scale)
    statistics, gradient = divergence(
        *(student, teacher, student_scale, teacher_scale, delta, beta),
        ids=ids,
        weight=weight,
        logprob_weight=logprob_weight,
        want_entropy=True,
    )
    assert_near(statistics[D], divergence_from_log_probs(log_student, log_teacher, beta).clamp(min=0), floor=1e-3)
    assert_near(statistics[STUDENT_LOGPROB], log_student.gather(-1, ids[:, None]).squeeze(-1), floor=1.0)
    assert_near(statistics[TEACHER_LOGPROB], log_teacher.gather(-1, ids[:, None]).squeeze(-1), floor=1.0)
    assert_near(statistics[STUDENT_ENTROPY], entropy_of(zs), floor=1.0)
    assert_near(statistics[TEACHER_ENTROPY], entropy_of(zt), floor=1.0)
    assert_near(gradient, exact, floor=0.1)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("delta", [False, True])
def test_small_divergences_keep_their_digits(beta, delta):
    student = random_tile(4, 20011)
    difference = random_tile(4, 20011, std=1e-3)
    teacher = difference if delta else student + difference
    zs = student.double()
    log_student = torch.log_softmax(zs, -1)
    log_teacher = torch.log_softmax(zs + difference.double() if delta else teacher.double(), -1)
    exact = divergence_from_log_probs(log_student, log_teacher, beta)
    assert 1e-8 < float(exact.min()) < float(exact.max()) < 1e-5
    statistics, _ = divergence(student, teacher, delta=delta, beta=beta)
    relative = ((statistics[D].double() - exact) / exact).abs().max()
    assert relative < (1e-5 if delta else 1e-3)
    if delta:
        log_ratio = (zs + difference.double()).logsumexp(-1) - zs.logsumexp(-1)
        torch.testing.assert_close(statistics[LOG_RATIO].double(), log_ratio, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("beta", [2.0**-25, 1e-6, 0.02, 0.97, 1 - 1e-6, 1 - 2.0**-25])
@pytest.mark.parametrize("delta", [False, True])
def test_mixtures_of_which_one_share_is_next_to_nothing(beta, delta):
    student, difference = random_tile(4, 3001, std=3.0), random_tile(4, 3001, std=3.0)
    zs = student.double()
    teacher = difference if delta else student + difference
    log_teacher = torch.log_softmax(zs + difference.double() if delta else teacher.double(), -1)

    def objective(z):
        return divergence_from_log_probs(torch.log_softmax(z, -1), log_teacher, beta)

    statistics, gradient = divergence(student.clone(), teacher, delta=delta, beta=beta)
    torch.testing.assert_close(statistics[D].double(), objective(zs), rtol=2e-5, atol=0.0)
    assert_near(gradient, gradient_of(objective, student, None), tolerance=2e-5)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("delta", [False, True])
def test_equal_rows_have_no_divergence(beta, delta):
    student = random_tile(2, 1000)
    teacher = torch.zeros_like(student) if delta else student.clone()
    statistics, gradient = divergence(student, teacher, delta=delta, beta=beta)
    assert float(statistics[D].max()) < 1e-12
    assert float(gradient.abs().max()) < 1e-6


@pytest.mark.parametrize("beta", BETAS)
def test_masked_columns(beta):
    """Columns masked in both change nothing: no NaN, no gradient."""
    student, teacher = random_tile(3, 1003), random_tile(3, 1003)
    kept = torch.rand(1003, device=DEVICE) < 0.5
    expected, expected_gradient = divergence(
        student[:, kept].contiguous(), teacher[:, kept].contiguous(), beta=beta, want_entropy=True
    )
    student[:, ~kept] = teacher[:, ~kept] = MASKED
    statistics, gradient = divergence(student, teacher, beta=beta, want_entropy=True)
    assert_near(statistics, expected.double())
    assert_near(gradient[:, kept], expected_gradient.double(), floor=0.1)
    assert float(gradient[:, ~kept].abs().max()) == 0.0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("where", ["student", "teacher", "delta", "student capped", "teacher capped"])
def test_extreme_logits_and_such_that_are_not_finite(beta, where, value):
    student, teacher = random_tile(3, 600), random_tile(3, 600)
    student[0, 3], student[0, 5], teacher[0, 5] = 1e4, -1e4, 1e4
    (student if where.startswith("student") else teacher)[1, 8] = value
    cap = 5.0 if where.endswith("capped") else None
    statistics, gradient = divergence(student, teacher, cap, cap, where == "delta", beta, want_entropy=True)
    for statistic in (D, STUDENT_ENTROPY, TEACHER_ENTROPY):
        assert statistics[statistic].isnan().tolist() == [False, True, False]
    if cap is None and where != "delta":
        assert float(statistics[D][0]) > 0.3
    assert gradient[[0, 2]].isfinite().all()
    assert gradient[1].isnan().all()


@pytest.mark.parametrize("beta", BETAS)
def test_rows_of_differences_far_apart_and_near(beta):
    """Every other row holds z_t itself; where z_t - z_s is large, p_t still sums to one."""
    student, difference = random_tile(8, 3000, std=30.0), random_tile(8, 3000, std=30.0)
    difference[:4] *= 0.03
    is_difference = torch.arange(8, device=DEVICE) % 2 == 0
    teacher = torch.where(is_difference[:, None], difference, student + difference)
    zs = student.double()
    log_student = torch.log_softmax(zs, -1)
    log_teacher = torch.log_softmax(torch.where(is_difference[:, None], zs + teacher.double(), teacher.double()), -1)
    exact = divergence_from_log_probs(log_student, log_teacher, beta)
    statistics = torch.empty(NUM_STATISTICS, 8, device=DEVICE)
    run("tile_divergence_", student, teacher, None, None, is_difference, None, beta, False, statistics)
    # The teacher's logits go to 200, and are rounded to 1e-5.
    torch.testing.assert_close(statistics[D].double(), exact, rtol=5e-5, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("tanh_scale", [None, 5.0])
def test_scores_of_logits_that_are_not_finite(tanh_scale, value):
    tile, ids = random_tile(3, 700), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    tile[1, 350] = value
    logsumexp, entropy = vector(3, -torch.inf), vector(3)
    for first, last in ((0, 300), (300, 700)):
        run("tile_score_", tile[:, first:last], tanh_scale, None, first, logsumexp, None, entropy)
    softmax, sums = tile.clone(), vector(3)
    run("tile_softmax_", softmax, tanh_scale, ids, sums, vector(3))
    for values in (logsumexp, entropy, sums, softmax.sum(-1)):
        assert values.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("columns", COLUMNS)
def test_only_the_rows_are_written(columns):
    """Not the columns between them, nor what lies before and after."""
    rows, padding = 3, 5
    ids = torch.zeros(rows, dtype=torch.int64, device=DEVICE)

    def surroundings(tile):
        whole = torch.as_strided(tile, (1 + rows * (columns + padding),), (1,), tile.storage_offset() - 1)
        inside = torch.zeros_like(whole, dtype=torch.bool)
        inside[1:].view(rows, -1)[:, :columns] = True
        return whole[~inside]

    for tanh_scale in (None, 5.0):
        tiles = [random_tile(rows, columns, padding=padding, offset=1) for _ in range(4)]
        run("tile_softmax_", tiles[0], tanh_scale, ids, vector(rows), vector(rows))
        run("tile_logprob_gradient_", tiles[1], tanh_scale, vector(rows), ids, vector(rows), None, None, None)
        divergence(tiles[2], tiles[3], tanh_scale, tanh_scale, ids=ids)
        for tile in tiles:
            assert (surroundings(tile) == 1e9).all()


def test_no_rows():
    empty, ids, none = random_tile(0, 7), torch.zeros(0, dtype=torch.int64, device=DEVICE), vector(0)
    run("tile_score_", empty, None, ids, 0, none, none, none)
    run("tile_softmax_", empty, None, ids, none, none)
    run("tile_logprob_gradient_", empty, None, none, ids, none, None, None, None)
    divergence(empty, empty.clone(), ids=ids)
    run("scale_rows", empty, none, empty.clone())
    run("ema_update_", [none], [none], 0.5, [], False, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 33, 256, 1031])
def test_scale_rows(dtype, columns):
    rows, scale = random_tile(5, columns, padding=2), torch.randn(5, device=DEVICE)
    for out in (
        torch.empty(5, columns, dtype=dtype, device=DEVICE),
        torch.empty(5, columns + 3, dtype=dtype, device=DEVICE)[:, 1:-2],
    ):
        run("scale_rows", rows, scale, out)
        assert torch.equal(out, (rows * scale[:, None]).to(dtype))


def test_results_do_not_change_from_run_to_run():
    student, teacher = random_tile(7, 5003), random_tile(7, 5003)
    first = divergence(student.clone(), teacher.clone(), beta=0.5, want_entropy=True)
    for _ in range(3):
        again = divergence(student.clone(), teacher.clone(), beta=0.5, want_entropy=True)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, again, strict=True))


def test_a_side_stream():
    tile = random_tile(64, 5003)
    expected = torch.logsumexp(tile.double(), -1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    logsumexp = vector(64, -torch.inf)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        shifted = tile + 1.0
        run("tile_score_", shifted, None, None, 0, logsumexp, None, None)
    torch.cuda.current_stream().wait_stream(stream)
    assert_near(logsumexp, expected + 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda t, v: (t.double(), None, None, 0, v, None, None), "tile must be float32"),
        (lambda t, v: (t.T, None, None, 0, v, None, None), "contiguous rows"),
        (lambda t, v: (t, None, None, 0, v[:2], None, None), "one number for each of the 3 rows"),
        (lambda t, v: (t, None, v.int(), 0, v, v, None), "target_ids must be int64"),
    ],
)
def test_bad_tiles(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        run("tile_score_", *arguments(random_tile(3, 4), vector(3)))


# The moving average.


def spread(count, dtype, low=-20, high=14):
    """Numbers over many magnitudes, zeros and both signs."""
    exponent = torch.randint(low, high, (count,)).double()
    values = (torch.rand(count, dtype=torch.float64) + 1.0) * 2.0**exponent * torch.randn(count).sign()
    values[:: max(1, count // 7)] = 0.0
    return values.to(dtype)


@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("student_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_plain_average_of_many_tensors(teacher_dtype, student_dtype):
    """More tensors than one launch takes, of sizes around the block's and none, some off alignment."""
    sizes = [0, 1, 7, 16384, 16385, 40000] + [int(n) for n in torch.randint(0, 50, (150,))]
    teacher = [torch.randn(n + 1, dtype=teacher_dtype)[n % 2 : n + n % 2] for n in sizes]
    student = [torch.randn(n, dtype=torch.float64).to(student_dtype) for n in sizes]
    ours = []
    for values in teacher:  # as far from alignment as on the CPU
        offset = values.storage_offset()
        ours.append(torch.empty(len(values) + offset, dtype=teacher_dtype, device=DEVICE)[offset:].copy_(values))
    run("ema_update_", ours, [values.to(DEVICE) for values in student], 0.9, [], False, 0)
    for before, source, after in zip(teacher, student, ours, strict=True):
        exact = 0.9 * before.double() + (1.0 - 0.9) * source.double()
        torch.testing.assert_close(after.cpu().double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_thousand_steps_in_sixteen_bits(dtype, stochastic):
    start = (torch.rand(4001) + 0.5).to(dtype)
    target = (start.float() * 1.05).to(DEVICE)
    ours, exact = start.to(DEVICE, copy=True), start.double()
    compensation = [] if stochastic else [torch.zeros_like(ours)]
    for step in range(1000):
        run("ema_update_", [ours], [target], 0.999, compensation, stochastic, step)
        reference_ema_update_([exact], [target.cpu().double()], 0.999)
    moved = float((ours.cpu().double() - start.double()).sum() / (exact - start.double()).sum())
    assert moved == pytest.approx(1.0, abs=0.02)
    half_ulp = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    error = float(((ours.cpu().double() - exact).abs() / exact).mean())
    assert error < (6 if stochastic else 1) * half_ulp


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stochastic", [False, True])
def test_sixteen_bits_are_those_of_the_cpu(dtype, student_dtype, stochastic):
    """Bit for bit, and for every tensor of a list; float16 includes its subnormal numbers and below."""
    sizes = [53, 0, 3 * 16384 + 4099, 4096, 99]
    teacher, student = [spread(n, dtype, -26) for n in sizes], [spread(n, student_dtype, -26) for n in sizes]
    ours = [values.to(DEVICE, copy=True) for values in teacher]
    compensation = [] if stochastic else [torch.zeros_like(values) for values in teacher]
    our_compensation = [values.to(DEVICE, copy=True) for values in compensation]
    for seed, decay in ((0, 0.7), (2**40 + 7, 0.2)):
        torch.ops.unisd.ema_update_(teacher, student, decay, compensation, stochastic, seed)
        run("ema_update_", ours, [s.to(DEVICE) for s in student], decay, our_compensation, stochastic, seed)
        for expected, got in zip([*teacher, *compensation], [*ours, *our_compensation], strict=True):
            assert torch.equal(expected.view(torch.int16), got.cpu().view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased_and_bounded(dtype):
    info = torch.finfo(dtype)
    step = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    cases = {1.0 + step / 4: {1.0, 1.0 + step}, -(1.0 + step / 4): {-1.0, -1.0 - step}}
    if dtype == torch.float16:
        cases |= {2.0**-26: {0.0, 2.0**-24}, 2.25 * 2.0**-24: {2 * 2.0**-24, 3 * 2.0**-24}}
    for value, neighbours in cases.items():
        teacher = torch.zeros(20000, dtype=dtype, device=DEVICE)
        run("ema_update_", [teacher], [torch.full((20000,), value, device=DEVICE)], 0.0, [], True, 3)
        assert set(teacher.unique().tolist()) == neighbours
        gap = max(neighbours) - min(neighbours)
        assert float(teacher.double().mean()) == pytest.approx(value, abs=0.02 * gap)
    # Just above the largest number: nearest rounding would not go to infinity, so no draw does.
    above = info.max * (1.0 + step / 8)
    teacher = torch.zeros(5000, dtype=dtype, device=DEVICE)
    run("ema_update_", [teacher], [torch.full((5000,), above, device=DEVICE)], 0.0, [], True, 3)
    assert teacher.unique().tolist() == [info.max]


def test_what_is_not_finite_stays():
    source = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0], device=DEVICE)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        teacher = torch.zeros(4, dtype=dtype, device=DEVICE)
        run("ema_update_", [teacher], [source], 0.5, [], True, 0)
        assert teacher[0].isnan()
        assert teacher[1:].tolist() == [torch.inf, -torch.inf, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_the_decay(dtype):
    """Exactly the student, exactly the teacher, whatever the other is; and nothing lost beside a large teacher."""
    student = torch.tensor([1.0, -0.3, torch.nan, torch.inf], device=DEVICE)
    start = torch.tensor([1e8, torch.nan, 2.0, 3.0], dtype=dtype, device=DEVICE)
    for decay, expected in ((0.0, student.to(dtype)), (1.0, start)):
        teacher = start.clone()
        run("ema_update_", [teacher], [student], decay, [], False, 0)
        torch.testing.assert_close(teacher, expected, rtol=0, atol=0, equal_nan=True)
    teacher = start[:1].clone()
    run("ema_update_", [teacher], [student[:1]], 1e-9, [], False, 0)
    assert float(teacher) == pytest.approx(1.1, rel=1e-6)


def test_bad_averages():
    teacher, other = torch.zeros(4, 4, device=DEVICE), torch.zeros(16, device=DEVICE)
    for arguments, message in (
        (([teacher], [], 0.5, [], False, 0), "1 tensors but student has 0"),
        (([teacher], [other], 0.5, [], False, 0), "tensor 0: teacher and student must have the same shape"),
        (([teacher.T[:2]], [teacher.T[:2]], 0.5, [], False, 0), "contiguous"),
        (([teacher.long()], [teacher], 0.5, [], False, 0), "teacher must be float32"),
        (([teacher.half()], [teacher], 0.5, [], False, 0), "needs compensation or stochastic rounding"),
        (([teacher.half()], [teacher], 0.5, [teacher], False, 0), "compensation must have the teacher's dtype"),
        (([teacher], [teacher], 1.5, [], False, 0), "decay must be in"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run("ema_update_", *arguments)
