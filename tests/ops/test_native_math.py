"""exp, log, expm1 and tanh of the CPU kernels, over the bit patterns of float32 and for every instruction set.

`python -m tests.ops.test_native_math` prints the worst errors of the set that UNISD_CPU_ISA names.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ops.native_tiles import needs_library
from unisd_kernels.backends import extension

ROOT = Path(__file__).parents[2]
ISAS = ("scalar", "neon") if platform.machine() == "aarch64" else ("scalar", "avx2", "avx512")
FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exp": np.exp,
    "log": np.log,
    "expm1": np.expm1,
    "tanh": np.tanh,
}
# In units in the last place of the exact result; of subnormal results, in multiples of 2^-149. Measured worst over the
# points below, without fused multiplications (scalar) and with them (avx2 and avx512): exp 1.05 and 1.07, log 0.82 and
# 0.83, expm1 1.65 and 1.77, tanh 3.20 and 3.02.
MAX_ULP = {"exp": 2.0, "log": 2.0, "expm1": 2.5, "tanh": 4.0}

pytestmark = needs_library


def vector_math(function: str, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    extension.operations().vector_math(function, x, out)
    return out


def points() -> np.ndarray:
    """Every 997th bit pattern of a finite float32, and all patterns near those where an algorithm changes its mind."""
    largest = 0x7F7FFFFF
    magnitudes = [np.arange(0, largest + 1, 997, dtype=np.int64)]

    def near(value: float, reach: int) -> None:
        center = int(np.float32(abs(value)).view(np.uint32))
        magnitudes.append(np.arange(max(0, center - reach), min(largest, center + reach) + 1))

    near(0.0, 20000)
    near(1.0, 50000)
    near(float(np.finfo(np.float32).max), 20000)
    for exponent in range(-149, 128):
        near(2.0**exponent, 300)
    # Overflow, the first subnormal and the last non-zero result of exp; half of that for tanh; the sign of log; the
    # limits of the reductions by ln(2).
    for value in (88.7228, 87.3365, 103.278, 103.972, 89.0, 104.0, 105.0, 44.36, 9.01, 0.5**0.5, 2.0**0.5, 0.25, 0.5):
        near(value, 20000)
    for multiple in range(1, 310):
        near((multiple / 2) * np.log(2.0), 200)
    bits = np.concatenate(magnitudes).astype(np.uint32)
    return np.concatenate([bits, bits | np.uint32(0x80000000)]).view(np.float32)


def ulp(exact: np.ndarray) -> np.ndarray:
    """One unit in the last place of the float32 nearest to each number."""
    _, exponent = np.frexp(np.abs(exact))
    return np.ldexp(1.0, np.maximum(exponent - 24, -149))


def worst_errors() -> dict[str, tuple[float, float]]:
    """By function: the worst error in ulp, and where. Infinite where the kind of the result (NaN, infinity with its
    sign) is wrong."""
    x = points()
    wide = x.astype(np.float64)
    worst = {}
    for name, function in FUNCTIONS.items():
        with np.errstate(all="ignore"):
            exact = function(wide)
            nearest = exact.astype(np.float32)
            ours = vector_math(name, torch.from_numpy(x)).numpy()
            error = np.abs(ours.astype(np.float64) - exact) / ulp(exact)
            special = ~np.isfinite(nearest) | ~np.isfinite(ours)
            error[special] = 0.0
            # Infinity where the exact result is just below the limit (or the other way round) is an error of that many
            # ulp of the largest number.
            limit = float(np.finfo(np.float32).max)
            clipped = np.clip(np.nan_to_num(ours.astype(np.float64), nan=0.0), -(2.0**128), 2.0**128)
            bounded = np.clip(np.nan_to_num(exact, nan=0.0), -(2.0**128), 2.0**128)
            both = special & ~np.isnan(exact) & ~np.isnan(ours) & (np.abs(bounded) > 0.999 * limit)
            error[both] = (np.abs(clipped - bounded) / 2.0**104)[both]
            error[special & ~both & ~((ours == nearest) | (np.isnan(ours) & np.isnan(nearest)))] = np.inf
        position = int(np.argmax(error))
        worst[name] = (float(error[position]), float(x[position]))
    return worst


def run(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "UNISD_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )


def check(isa: str, worst: dict[str, tuple[float, float]]) -> None:
    for name, (error, x) in worst.items():
        assert error <= MAX_ULP[name], f"{isa} {name}({x!r}) is off by {error} ulp"


def test_error_over_the_whole_range():
    check(extension.cpu_isa(), worst_errors())


@pytest.mark.exhaustive
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    result = run(isa, "-m", "tests.ops.test_native_math")
    if "is not an instruction set of this processor" in result.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert measured["isa"] == isa
    print(result.stdout)
    check(isa, measured["worst"])
    assert measured["special"] == "ok"


def check_special_values() -> str:
    inf, nan = float("inf"), float("nan")
    tiny = 2.0**-149
    expected = {
        "exp": [
            (-inf, 0.0),
            (inf, inf),
            (0.0, 1.0),
            (-0.0, 1.0),
            (-1e30, 0.0),
            (1e30, inf),
            (88.8, inf),
            (-104.0, 0.0),
        ],
        "log": [(0.0, -inf), (-0.0, -inf), (inf, inf), (1.0, 0.0), (-1.0, nan), (-inf, nan), (-tiny, nan)],
        "expm1": [(-inf, -1.0), (inf, inf), (0.0, 0.0), (-0.0, 0.0), (-200.0, -1.0), (tiny, tiny), (-tiny, -tiny)],
        "tanh": [(-inf, -1.0), (inf, 1.0), (0.0, 0.0), (-0.0, -0.0), (30.0, 1.0), (-30.0, -1.0), (tiny, tiny)],
    }
    for name, pairs in expected.items():
        x, right = (torch.tensor(column, dtype=torch.float32) for column in zip(*(*pairs, (nan, nan)), strict=True))
        ours = vector_math(name, x)
        torch.testing.assert_close(ours, right, rtol=0, atol=0, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}")
        if name == "tanh":
            assert torch.equal(ours[2:4].signbit(), torch.tensor([False, True]))
        # A NaN in any lane stays in its lane.
        for lane in range(19):
            many = torch.full((19,), 0.5)
            many[lane] = nan
            assert vector_math(name, many).isnan().nonzero().flatten().tolist() == [lane]
    return "ok"


def test_special_values():
    assert check_special_values() == "ok"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_length(function):
    """The last, incomplete vector gives what a complete one does, and nothing beyond it is written."""
    x = torch.rand(70) * 3 + 0.1
    whole = vector_math(function, x[:64])
    for length in range(65):
        buffer = torch.full((length + 40,), -7.0)
        extension.operations().vector_math(function, x[:length], buffer[20 : 20 + length])
        assert torch.equal(buffer[20 : 20 + length], whole[:length])
        assert (buffer[:20] == -7.0).all()
        assert (buffer[20 + length :] == -7.0).all()


def test_bad_arguments():
    math, x = extension.operations().vector_math, torch.ones(4)
    with pytest.raises(RuntimeError, match="function must be exp, log, expm1 or tanh, got sin"):
        math("sin", x, torch.empty(4))
    with pytest.raises(RuntimeError, match=r"out must have shape \[4\]"):
        math("exp", x, torch.empty(5))
    with pytest.raises(RuntimeError, match="x has the wrong dtype"):
        math("exp", x.double(), torch.empty(4))
    with pytest.raises(RuntimeError, match="x must be contiguous"):
        math("exp", torch.ones(8)[::2], torch.empty(4))


if __name__ == "__main__":
    print(json.dumps({"isa": extension.cpu_isa(), "worst": worst_errors(), "special": check_special_values()}))
