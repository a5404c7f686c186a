"""The elementwise functions inside the kernels, against float64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.triton.support import DEVICE
from unisd_kernels.backends.triton import math as kernel_math


@triton.jit
def _apply(source, out, FUNCTION: tl.constexpr, SIZE: tl.constexpr):
    x = tl.load(source + tl.arange(0, SIZE))
    if FUNCTION == 0:
        x = kernel_math.expm1(x)
    elif FUNCTION == 1:
        x = kernel_math.log1p(x)
    else:
        x = kernel_math.tanh(x)
    tl.store(out + tl.arange(0, SIZE), x)


# Relative error of a GPU's 2^x instruction (ex2.approx.f32 in NVIDIA's PTX manual). The interpreter's is exact.
EX2_ERROR = 2.0**-22 if DEVICE.type == "cuda" else 0.0
FUNCTIONS = pytest.mark.parametrize(
    ("function", "exact", "low", "high"),
    [(0, torch.expm1, -80.0, 80.0), (1, torch.log1p, -0.999, 1e4), (2, torch.tanh, -50.0, 50.0)],
)


def _shares_of_exp(function: int, x: torch.Tensor) -> torch.Tensor:
    """By how much a relative error of e^x is multiplied in the function's own; 0 where a polynomial stands for it."""
    argument = 2.0 * x.abs() if function == 2 else x
    share = torch.exp(argument) / torch.expm1(argument).abs()
    if function == 2:  # e / (e + 2) with e = e^2x - 1
        share = share * 2.0 / (torch.expm1(argument) + 2.0)
    return torch.where((argument.abs() < 0.5) | torch.tensor(function == 1, device=x.device), 0.0, share)


def _assert_relative_error(function, exact, low, high, ex2_error):
    size = 4096
    magnitudes = torch.logspace(-12, 0, size // 2, dtype=torch.float64)
    x = torch.cat((magnitudes * high, magnitudes * low)).float().to(DEVICE)
    out = torch.full_like(x, torch.nan)
    _apply[(1,)](x, out, FUNCTION=function, SIZE=size)
    expected = exact(x.double())
    # e^x itself is good to |x| units of the last place: its argument is rounded.
    allowed = 4e-7 + (1.2e-7 * x.abs().double() if function == 0 else 0.0)
    allowed = allowed + ex2_error * _shares_of_exp(function, x.double())
    assert ((out.double() - expected).abs() <= allowed * expected.abs()).all()


@FUNCTIONS
def test_relative_error(function, exact, low, high):
    _assert_relative_error(function, exact, low, high, EX2_ERROR)


@triton.jit
def _high_exp(x):
    return tl.exp2(x * 1.4426950408889634) * (1.0 + 2.0**-22)


@triton.jit
def _low_exp(x):
    return tl.exp2(x * 1.4426950408889634) * (1.0 - 2.0**-22)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="replaces a function inside the kernels, which the interpreter can")
@pytest.mark.parametrize("exp", [_high_exp, _low_exp])
@FUNCTIONS
def test_relative_error_with_the_exponential_of_a_gpu(function, exact, low, high, exp, monkeypatch):
    """What a GPU is held to can be met by one whose instruction is as far off as it may be."""
    monkeypatch.setattr(kernel_math, "exp", exp)
    _assert_relative_error(function, exact, low, high, 2.0**-22)
    if function == 0:
        with pytest.raises(AssertionError):
            _assert_relative_error(function, exact, low, high, 0.0)


def test_the_ends_of_the_range():
    nan, infinity = torch.nan, torch.inf
    x = torch.tensor([0.0, -0.0, infinity, -infinity, nan, 1e30, -1e30, 1e-38], device=DEVICE)
    for function, exact in ((0, torch.expm1), (2, torch.tanh)):
        out = torch.empty_like(x)
        _apply[(1,)](x, out, FUNCTION=function, SIZE=8)
        torch.testing.assert_close(out, exact(x), equal_nan=True)
