"""Elementwise functions that keep the digits of small numbers, for use inside kernels; and where a program is.

Plain Triton on purpose: the vendors' mathematical libraries are not there under the interpreter, and differ by backend.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Arguments that change from call to call and are no addresses: Triton would compile another variant where one is 1, or
# a multiple of 16.
COUNTS = ["num_rows", "num_blocks", "num_programs", "num_splits"]


@triton.jit
def tile_block(num_columns, BLOCK_COLUMNS: tl.constexpr):
    """Block of columns and block of rows of a program of `launch.tile_grid`."""
    column_blocks = tl.cdiv(num_columns, BLOCK_COLUMNS)
    return tl.program_id(0) % column_blocks, tl.program_id(0) // column_blocks


@triton.jit
def exp(x):
    """e^x. By way of exp2, which Triton compiles to one instruction; its exp takes three more for results below 1e-38,
    which count for nothing here."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def expm1_remainder(x):
    """e^x - 1 - x to a few units of the last place."""
    # A Taylor polynomial below |x| = 0.5, where the terms of the other form would cancel. The first term left out is
    # x^10 / 10!, of the result 2 x^8 / 10!: at 0.5 2e-9, a twenty-eighth of float32's unit roundoff.
    small = 1.0 / 40320.0 + x * (1.0 / 362880.0)
    small = 1.0 / 5040.0 + x * small
    small = 1.0 / 720.0 + x * small
    small = 1.0 / 120.0 + x * small
    small = 1.0 / 24.0 + x * small
    small = 1.0 / 6.0 + x * small
    small = 0.5 + x * small
    return tl.where(tl.abs(x) < 0.5, x * x * small, exp(x) - 1.0 - x)


@triton.jit
def expm1(x):
    """e^x - 1 to a few units of the last place."""
    return tl.where(tl.abs(x) < 0.5, x + expm1_remainder(x), exp(x) - 1.0)


@triton.jit
def log1p_remainder(x):
    """x - log(1 + x) for x > -1 to a few units of the last place.

    With s = x / (2 + x), log(1 + x) = 2 atanh(s), whose series starts with 2 s; the difference of that from x is
    x^2 / 2 times 1 - s. Beyond |x| = 0.4 nothing cancels.
    """
    half_square = 0.5 * x * x
    near = tl.minimum(tl.maximum(x, -0.4), 0.4)
    s = near / (2.0 + near)
    square = s * s
    series = 2.0 / 11.0 + square * (2.0 / 13.0)
    series = 2.0 / 9.0 + square * series
    series = 2.0 / 7.0 + square * series
    series = 2.0 / 5.0 + square * series
    series = 2.0 / 3.0 + square * series
    small = half_square - s * (half_square + square * series)
    return tl.where(near == x, small, x - tl.log(1.0 + x))


@triton.jit
def log_share(d, beta, complement):
    """log of `m / max(p_s, p_t)`, m = (1 - beta) p_s + beta p_t, of d = log p_t - log p_s; so `log(m / p_s)` is
    max(d, 0) more, `log(m / p_t)` max(-d, 0). Where it is near 0 the rounding of the share is all of it."""
    smaller = exp(-tl.abs(d))
    share = tl.where(d > 0.0, beta + complement * smaller, complement + beta * smaller)
    return tl.log(tl.maximum(share, 1e-37))


@triton.jit
def short_log1p(x):
    """log(1 + x) for |x| < 0.1, by its series: the first term left out is x^7 / 7, of the result 1.5e-7 at most."""
    series = 1.0 / 5.0 - x * (1.0 / 6.0)
    series = 1.0 / 4.0 - x * series
    series = 1.0 / 3.0 - x * series
    series = 1.0 / 2.0 - x * series
    return x * (1.0 - x * series)


@triton.jit
def short_log1p_remainder(x):
    """x - log(1 + x) for |x| < 0.125, by its series: the first term left out is x^9 / 9, of the result 1e-7 at most."""
    series = 1.0 / 7.0 - x * (1.0 / 8.0)
    series = 1.0 / 6.0 - x * series
    series = 1.0 / 5.0 - x * series
    series = 1.0 / 4.0 - x * series
    series = 1.0 / 3.0 - x * series
    return x * x * (1.0 / 2.0 - x * series)


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1. The rounding of 1 + x is divided out (W. Kahan)."""
    one_more = 1.0 + x
    rounded = one_more - 1.0
    ratio = x / tl.where(rounded == 0.0, 1.0, rounded)
    return tl.where(rounded == 0.0, x, tl.log(one_more) * ratio)


@triton.jit
def tanh(x):
    # 2 |x| <= 40: beyond it the result is one to the last bit, and e^(2x) would overflow.
    e = expm1(tl.minimum(2.0 * tl.abs(x), 40.0))
    magnitude = e / (e + 2.0)
    # min() drops a NaN; put it back.
    return tl.where(x != x, x, tl.where(x < 0.0, -magnitude, magnitude))


@triton.jit
def nan_unless_finite(x):
    """0, or NaN where x is infinite or NaN. Added to a number it costs one instruction."""
    return x * 0.0


@triton.jit
def apply_softcap(x, tanh_scale):
    """z from `x = product_scale (h W^T + b)`: `tanh_scale tanh(x)`, or x where there is no cap (`tanh_scale` is None).

    NaN of what is not finite: minus infinity would drop out of a softmax, and a cap would make a number of it.
    """
    z = x
    if tanh_scale is not None:
        z = tanh(x) * tanh_scale
    return z + nan_unless_finite(x)


@triton.jit
def softcap_gradient(z, tanh_scale):
    """dz / d(a x / tau) under a soft cap: 1 - tanh^2."""
    ratio = z / tanh_scale
    return 1.0 - ratio * ratio
