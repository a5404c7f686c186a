"""The operations `torch.ops.unisd.*`: the list of them, their schemas, and what each refuses."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from tests.ops.native_tiles import make_tile, needs_library
from unisd_kernels.backends import extension, native

pytestmark = needs_library

CSRC = Path(__file__).parents[2] / "csrc"


def arguments():
    """Small arguments of each operation, by its name."""
    rows, columns = 3, 20
    ids, vector = torch.arange(rows), torch.full((rows,), 0.5)

    def tile():
        return make_tile(rows, columns, 0)

    def new():
        return torch.zeros(rows)

    statistics, is_delta = torch.empty(native._NUM_STATISTICS, rows), torch.tensor([True, False, True])
    extension.operations().tile_divergence_(tile(), tile() + 1, 2.0, None, None, ids, 0.5, True, statistics)
    hidden, weight = torch.randn(rows, 5), torch.randn(columns, 5)
    return {
        "tile_softmax_": (tile(), None, ids, new(), new()),
        "tile_logprob_gradient_": (tile(), None, vector * 10, ids, vector, vector, vector, vector),
        "tile_divergence_": (tile(), tile() + 1, None, None, is_delta, ids, 0.5, True, torch.empty_like(statistics)),
        "tile_divergence_gradient_": (tile(), tile() + 1, None, is_delta, ids, 0.5, statistics, vector, vector),
        "scale_rows": (tile(), vector, torch.empty(rows, columns, dtype=torch.bfloat16)),
        "ema_update_": ([torch.randn(4), torch.randn(3)], [torch.randn(4), torch.randn(3)], 0.9, [], False, 1),
        "linear_score": (hidden, weight, torch.randn(columns), 1.0, None, ids, new(), new(), new()),
        "linear_logits": (hidden, weight, None, 1.0, torch.empty(rows, columns)),
        "linear_backward": (tile(), weight, 1.0, torch.empty(rows, 5)),
        "linear_weight_gradient": (tile(), hidden, 1.0, False, torch.empty(columns, 5)),
        "int8_score": int8_arguments(hidden, weight),
        "vector_math": ("exp", vector, new()),
    }


def int8_arguments(hidden: torch.Tensor, weight: torch.Tensor) -> tuple:
    """Rows of five numbers in whole groups of four, with two directions apart."""
    (rows, width), columns = hidden.shape, weight.shape[0]
    padded = -(-width // 4) * 4
    codes = (
        torch.zeros(rows, padded, dtype=torch.int8),
        torch.ones(rows),
        torch.randn(rows, 2),
        torch.full((rows,), -9.0),
    )
    head = torch.zeros(columns, padded, dtype=torch.int8), torch.ones(columns), torch.zeros(columns, dtype=torch.int32)
    return (*codes, hidden, *head, torch.randn(columns, 2), weight, None, 1.0, None, -9.0, torch.empty(6, rows))


def test_the_list_of_operations():
    source = (CSRC / "ops.cpp").read_text()
    assert tuple(re.findall(r'm\.def\(\s*"(\w+)\(', source)) == extension.OPERATIONS
    extension.operations()
    for name in extension.OPERATIONS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"unisd::{name}", "CPU"), name
        assert not getattr(torch.ops.unisd, name).default._schema.returns
    assert set(arguments()) == set(extension.OPERATIONS)


def test_the_statistics_that_python_reads():
    """native.py repeats csrc/cpu/statistics.h: the order of the first five, and how many there are."""
    numbers = dict(re.findall(r"^  k(\w+) = (\d+),", (CSRC / "cpu" / "statistics.h").read_text(), re.MULTILINE))
    names = ("DIVERGENCE", "STUDENT_LOGPROB", "TEACHER_LOGPROB", "STUDENT_ENTROPY", "TEACHER_ENTROPY")
    for name in names:
        assert getattr(native, f"_{name}") == int(numbers[name.title().replace("_", "")])
    assert int(numbers["DivergenceStatistics"]) == native._NUM_STATISTICS


@pytest.mark.parametrize("name", extension.OPERATIONS)
def test_opcheck(name):
    """Schema (what is mutated), fake implementation, and behaviour under torch.compile."""
    operation = getattr(extension.operations(), name).default
    results = torch.library.opcheck(operation, arguments()[name])
    assert set(results.values()) == {"SUCCESS"}


def altered(name: str, **changes):
    """Arguments of `name` with some replaced, by position (`_3`)."""
    values = list(arguments()[name])
    for position, value in changes.items():
        values[int(position[1:])] = value
    return values


TILE, IDS = torch.zeros(3, 20), torch.arange(3)
BAD = [
    ("tile_softmax_", {"_0": TILE.double()}, "tile must be float32"),
    ("tile_softmax_", {"_0": TILE[0]}, "tile must have two dimensions, got 1"),
    ("tile_softmax_", {"_0": torch.zeros(20, 3).T}, "tile must have contiguous rows, got a stride of 3"),
    ("tile_softmax_", {"_3": torch.zeros(4)}, r"logsumexp must have shape \[3\]"),
    ("tile_softmax_", {"_3": torch.zeros(3).double()}, "logsumexp has the wrong dtype"),
    ("tile_softmax_", {"_4": torch.zeros(6)[::2]}, "target_logits must be contiguous"),
    ("tile_softmax_", {"_2": IDS.int()}, "target_ids has the wrong dtype"),
    ("tile_softmax_", {"_2": IDS[:2]}, r"target_ids must have shape \[3\]"),
    ("tile_softmax_", {"_2": IDS + 18}, r"target_ids must be in \[0, 20\), got 20 at position 2"),
    ("tile_softmax_", {"_2": IDS - 1}, r"target_ids must be in \[0, 20\), got -1 at position 0"),
    ("tile_softmax_", {"_0": TILE.bfloat16()}, "tile must be float32"),
    ("tile_logprob_gradient_", {"_6": None}, "entropy_weight needs entropy"),
    ("tile_logprob_gradient_", {"_4": torch.zeros(2)}, r"logprob_weight must have shape \[3\]"),
    ("tile_logprob_gradient_", {"_3": IDS * 20}, r"target_ids must be in \[0, 20\), got 20"),
    ("int8_score", {"_0": torch.zeros(3, 5, dtype=torch.int8)}, "codes must"),
    ("int8_score", {"_7": torch.zeros(20)}, "head_offsets has the wrong dtype"),
    ("int8_score", {"_14": torch.empty(5, 3)}, "sums must"),
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
    ("tile_divergence_", {"_4": torch.ones(3)}, "teacher_is_delta has the wrong dtype"),
    ("tile_divergence_", {"_4": torch.ones(2, dtype=torch.bool)}, r"teacher_is_delta must have shape \[3\]"),
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
    ("ema_update_", {"_3": [torch.zeros(4), torch.zeros(3)], "_4": True}, "either stochastic rounding or compensation"),
    ("ema_update_", {"_3": [torch.zeros(4)]}, "compensation has 1 tensors but teacher has 2"),
    ("ema_update_", {"_0": [torch.zeros(4).int(), torch.zeros(3)]}, "teacher must be float32, float64"),
]


@pytest.mark.parametrize(("name", "changes", "message"), BAD)
def test_bad_arguments(name, changes, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(extension.operations(), name)(*altered(name, **changes))
