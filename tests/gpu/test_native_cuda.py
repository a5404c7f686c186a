"""The ahead-of-time CUDA moving average (csrc/cuda) against float64 and the CPU's bits: random tensors and the corners.

Needs a GPU and the library: `python csrc/nvcc.py`.
"""

from __future__ import annotations

import pytest
import torch

from csrc import nvcc
from unisd_kernels.backends import extension
from unisd_kernels.reference.ema import ema_update_ as reference_ema_update_

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


@pytest.fixture(scope="module", autouse=True)
def _library():
    reason = extension.cuda_unavailable()
    if reason is None:
        return
    # Nothing may pass over these tests where the library could be there: it was not built, or not for this torch.
    if nvcc.find_nvcc() is not None or nvcc.LIBRARY.exists():
        pytest.fail(f"the CUDA library is not loaded: {reason}\nTo see why: python csrc/nvcc.py")
    pytest.skip(f"{reason}; this machine has no nvcc")


def ema_update_(*arguments):
    torch.ops.unisd.ema_update_(*arguments)


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
    ema_update_(ours, [values.to(DEVICE) for values in student], 0.9, [], False, 0)
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
        ema_update_([ours], [target], 0.999, compensation, stochastic, step)
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
        ema_update_(ours, [s.to(DEVICE) for s in student], decay, our_compensation, stochastic, seed)
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
        ema_update_([teacher], [torch.full((20000,), value, device=DEVICE)], 0.0, [], True, 3)
        assert set(teacher.unique().tolist()) == neighbours
        gap = max(neighbours) - min(neighbours)
        assert float(teacher.double().mean()) == pytest.approx(value, abs=0.02 * gap)
    # Just above the largest number: nearest rounding would not go to infinity, so no draw does.
    above = info.max * (1.0 + step / 8)
    teacher = torch.zeros(5000, dtype=dtype, device=DEVICE)
    ema_update_([teacher], [torch.full((5000,), above, device=DEVICE)], 0.0, [], True, 3)
    assert teacher.unique().tolist() == [info.max]


def test_what_is_not_finite_stays():
    source = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0], device=DEVICE)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        teacher = torch.zeros(4, dtype=dtype, device=DEVICE)
        ema_update_([teacher], [source], 0.5, [], True, 0)
        assert teacher[0].isnan()
        assert teacher[1:].tolist() == [torch.inf, -torch.inf, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_the_decay(dtype):
    """Exactly the student, exactly the teacher, whatever the other is; and nothing lost beside a large teacher."""
    student = torch.tensor([1.0, -0.3, torch.nan, torch.inf], device=DEVICE)
    start = torch.tensor([1e8, torch.nan, 2.0, 3.0], dtype=dtype, device=DEVICE)
    for decay, expected in ((0.0, student.to(dtype)), (1.0, start)):
        teacher = start.clone()
        ema_update_([teacher], [student], decay, [], False, 0)
        torch.testing.assert_close(teacher, expected, rtol=0, atol=0, equal_nan=True)
    teacher = start[:1].clone()
    ema_update_([teacher], [student[:1]], 1e-9, [], False, 0)
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
            ema_update_(*arguments)


def test_nothing_to_average():
    none = torch.zeros(0, device=DEVICE)
    ema_update_([none], [none], 0.5, [], False, 0)


def test_a_side_stream():
    teacher, student = torch.zeros(40000, device=DEVICE), torch.ones(40000, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        student = student + 1.0
        ema_update_([teacher], [student], 0.5, [], False, 0)
    torch.cuda.current_stream().wait_stream(stream)
    assert (teacher == 1.0).all()
