"""`ema_update_`: exact in float32, does not stall in 16 bits, refuses what would."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unisd_kernels import ema_update_, reference

DECAY, STEPS = 0.999, 600
FLOAT8 = torch.ones(2).to(torch.float8_e5m2)


def drift_to_target(dtype, **options):
    """Average towards a fixed target for many steps; returns (relative error against float64, share of the way)."""
    generator = torch.Generator().manual_seed(1)
    start = (torch.rand(4000, generator=generator) + 0.5).to(dtype)
    target = start.float() * 1.05
    teacher, exact = [start.clone()], [start.double()]
    for _ in range(STEPS):
        ema_update_(teacher, [target], DECAY, **options) if options or dtype == torch.float32 else (
            reference.ema_update_(teacher, [target], DECAY)
        )
        reference.ema_update_(exact, [target], DECAY)
    way = (teacher[0].double() - start.double()).sum() / (exact[0] - start.double()).sum()
    return float(((teacher[0].double() - exact[0]).abs() / exact[0]).mean()), float(way)


def test_float32_follows_the_formula():
    error, way = drift_to_target(torch.float32)
    assert error < 1e-6
    assert way == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_do_not_stall(dtype):
    half_ulp = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    _, naive = drift_to_target(dtype)
    assert naive < 0.2  # the trap this function exists for
    error, way = drift_to_target(dtype, compensation=[torch.zeros(4000, dtype=dtype)])
    assert error < half_ulp
    assert way == pytest.approx(1.0, abs=0.02)
    error, way = drift_to_target(dtype, rounding="stochastic", generator=torch.Generator().manual_seed(0))
    # Unbiased, but a random walk of one ulp at a time: some ulps of noise on each weight.
    assert error < 6 * half_ulp
    assert way == pytest.approx(1.0, abs=0.02)


def test_stochastic_rounding_is_unbiased_and_seeded():
    value = torch.full((20000,), 1.0 + 2**-9)  # a quarter of the way between two bfloat16 neighbours
    results = []
    for _ in range(2):
        teacher = [torch.ones(20000, dtype=torch.bfloat16)]
        ema_update_(teacher, [value], 0.0, rounding="stochastic", generator=torch.Generator().manual_seed(3))
        results.append(teacher[0])
    assert torch.equal(*results)
    assert set(results[0].unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert float(results[0].float().mean()) == pytest.approx(1.0 + 2**-9, abs=1.5e-4)


MODES = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "compensated": (torch.bfloat16, {"compensation": True}),
    "stochastic": (torch.bfloat16, {"rounding": "stochastic"}),
}


def updated(teacher, student, decay, options, contiguous):
    """The teacher (and what compensation keeps beside it) after one update, in float64: by the compiled library, which
    takes contiguous tensors, or by PyTorch's operations, which take the others."""

    def laid_out(tensor):
        return tensor.clone() if contiguous else torch.stack((tensor, tensor), -1)[..., 0]

    ours, options = laid_out(teacher), dict(options)
    if "compensation" in options:
        options["compensation"] = [laid_out(torch.zeros_like(teacher))]
    ema_update_([ours], [laid_out(student)], decay, **options)
    kept = options["compensation"][0].double() if "compensation" in options else 0.0
    return ours.double() + kept


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_decay_zero_copies_and_decay_one_leaves_alone(mode, contiguous):
    """Every element, whatever the other one is: 1e8 beside 1, infinities, NaN."""
    dtype, options = MODES[mode]
    student = torch.cat((torch.ones(3), torch.randn(1000, generator=torch.Generator().manual_seed(0)))).bfloat16()
    teacher = torch.randn(1003, generator=torch.Generator().manual_seed(1)).to(dtype)
    teacher[:3] = torch.tensor([1e8, torch.inf, torch.nan])
    copied = updated(teacher, student.float(), 0.0, options, contiguous)
    assert torch.equal(copied, student.double())
    broken = student.float()
    broken[3:5] = torch.tensor([torch.inf, torch.nan])
    left = updated(teacher, broken, 1.0, options, contiguous)
    assert torch.equal(left.nan_to_num(nan=7.0), teacher.double().nan_to_num(nan=7.0))


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("mode", MODES)
@given(
    decay=st.one_of(st.floats(0.0, 1.0), st.sampled_from([1e-12, 1e-9, 1e-3, 0.49, 0.5, 0.98, 0.999, 1.0 - 1e-7])),
    ratio=st.integers(-30, 30),
    seed=st.integers(0, 1000),
)
def test_every_decay_is_the_formula(mode, contiguous, decay, ratio, seed):
    """To some units in the last place of the larger of decay |teacher| and (1 - decay) |student|, however unequal the
    two are."""
    dtype, options = MODES[mode]
    generator = torch.Generator().manual_seed(seed)
    teacher = (torch.randn(40, generator=generator) * 2.0**ratio).to(dtype)
    student = torch.randn(40, generator=generator)
    kept, new = decay * teacher.double(), (1.0 - decay) * student.double()
    # Of the arithmetic, and of what the teacher is kept in: 16 bits and 16 more beside them, or a 16-bit neighbour.
    unit = {"float64": 2**-53, "float32": 2**-24, "compensated": 2**-16, "stochastic": 2**-7}[mode]
    error = (updated(teacher, student, decay, options, contiguous) - (kept + new)).abs()
    assert (error <= 6 * unit * torch.maximum(kept.abs(), new.abs()) + 1e-38).all()


def test_equal_weights_do_not_drift():
    weights = torch.randn(1000)
    for decay in (0.1, 0.3, 0.7, 0.98):
        teacher = weights.clone()
        ema_update_([teacher], [weights], decay)
        assert torch.equal(teacher, weights)


def test_mixed_dtypes_and_shapes():
    teacher = [torch.ones(2, 3), torch.ones((), dtype=torch.float64)]
    ema_update_(teacher, [torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor(3.0)], 0.75)
    assert torch.equal(teacher[0], torch.full((2, 3), 0.75))
    assert float(teacher[1]) == 1.5


def test_teacher_parameters_may_require_gradients():
    parameter = torch.nn.Parameter(torch.ones(3))
    ema_update_([parameter], [torch.nn.Parameter(torch.zeros(3))], 0.5)
    assert parameter.tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([torch.ones(2)], [], 0.5), {}, ValueError, "1 tensors but student has 0"),
        (([torch.ones(2)], [torch.ones(3)], 0.5), {}, ValueError, r"tensor 0: teacher has shape \(2,\)"),
        (([torch.ones(2)], [torch.ones(2)], 1.5), {}, ValueError, r"decay must be in \[0, 1\], got 1.5"),
        (([torch.ones(2).bfloat16()], [torch.ones(2)], 0.5), {}, ValueError, "stalls"),
        (([torch.ones(2).long()], [torch.ones(2)], 0.5), {}, TypeError, "got a teacher in torch.int64"),
        (([torch.ones(2)], [FLOAT8], 0.5), {}, TypeError, "a student in torch.float8_e5m2"),
        (([FLOAT8], [torch.ones(2)], 0.5), {}, TypeError, "a teacher in torch.float8_e5m2"),
        (([torch.ones(2)], [torch.ones(2)], 0.5), {"rounding": "up"}, ValueError, "got 'up'"),
        (
            ([torch.ones(2).half()], [torch.ones(2)], 0.5),
            {"compensation": [torch.zeros(2)]},
            ValueError,
            "compensation is torch.float32",
        ),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ema_update_(*arguments, **options)
