"""The kernels run on a GPU where there is one, and under the interpreter elsewhere; bfloat16 only on the former,
because the interpreter's product of such operands is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch

from tests.support import Problem

# A GPU's e^x has a relative error of about 2^-22 and of |x| 2^-24, and so have float32 sums of it.
GPU_FLOOR = 1e-5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NARROW = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])


def on_device(problem: Problem) -> Problem:
    """The same problem as fresh leaves on `DEVICE`."""
    return problem.map(lambda tensor: tensor.to(DEVICE))


def examples(sweep: Iterable[tuple[Any, ...]], kept: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Cases of a test, those that are not kept marked exhaustive. The interpreter takes seconds for a case."""
    return [case if case in kept else pytest.param(*case, marks=pytest.mark.exhaustive) for case in sweep]
