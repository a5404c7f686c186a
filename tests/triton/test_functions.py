"""The elementwise functions inside the kernels, against float64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.triton.support import DEVICE
from unisd_kernels.triton import functions


@triton.jit
def _apply(source, out, FUNCTION: tl.constexpr, SIZE: tl.constexpr):
    x = tl.load(source + tl.arange(0, SIZE))
    if FUNCTION == 0:
        x = functions.expm1(x)
    elif FUNCTION == 1:
        x = functions.log1p(x)
    else:
        x = functions.tanh(x)
    tl.store(out + tl.arange(0, SIZE), x)


@pytest.mark.parametrize(
    ("function", "exact", "low", "high"),
    [(0, torch.expm1, -80.0, 80.0), (1, torch.log1p, -0.999, 1e4), (2, torch.tanh, -50.0, 50.0)],
)
def test_relative_error(function, exact, low, high):
    size = 4096
    magnitudes = torch.logspace(-12, 0, size // 2, dtype=torch.float64)
    x = torch.cat((magnitudes * high, magnitudes * low)).float().to(DEVICE)
    out = torch.full_like(x, torch.nan)
    _apply[(1,)](x, out, FUNCTION=function, SIZE=size)
    expected = exact(x.double())
    # e^x itself is good to |x| units of the last place: its argument is rounded.
    allowed = 4e-7 + (1.2e-7 * x.abs().double() if function == 0 else 0.0)
    assert ((out.double() - expected).abs() <= allowed * expected.abs()).all()


def test_the_ends_of_the_range():
    nan, infinity = torch.nan, torch.inf
    x = torch.tensor([0.0, -0.0, infinity, -infinity, nan, 1e30, -1e30, 1e-38], device=DEVICE)
    for function, exact in ((0, torch.expm1), (2, torch.tanh)):
        out = torch.empty_like(x)
        _apply[(1,)](x, out, FUNCTION=function, SIZE=8)
        torch.testing.assert_close(out, exact(x), equal_nan=True)
