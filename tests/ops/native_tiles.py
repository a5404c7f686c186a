"""What the tests of the C++ backend share: float32 tiles of logits, alone or inside a larger matrix, and formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from tests.support import assert_accurate
from unisd_kernels.backends import extension

needs_library = pytest.mark.skipif(
    extension.cpu_unavailable() is not None, reason=f"no CPU library: {extension.cpu_unavailable()}"
)

# A mask that is a number: next to nothing in float32, and below 0 by more than any logit.
MASKED = -3e38
# Larger than any logit: a read beyond a row would show in the row's maximum.
CANARY = 12345.0
NOT_FINITE = [float("nan"), float("inf"), -float("inf")]
# Just above and below where vectors (8, 16), blocks of sums (1024) and what is unrolled end.
COLUMNS = sorted({n + d for n in (8, 16, 24, 32, 64, 1024, 2048, 4096) for d in (-1, 0, 1)} | {1, 2, 1040, 5000})
COLUMNS_STRATEGY = st.one_of(st.sampled_from(COLUMNS), st.integers(1, 5000))
CAP_STRATEGY = st.sampled_from([None, None, 0.5, 3.0, 30.0])


def inside(values: torch.Tensor, above: int, left: int, right: int, fill: float) -> torch.Tensor:
    """Copy of a matrix that is a part of a larger one, whose other entries are `fill`."""
    rows, columns = values.shape
    whole = torch.full((above + rows + 1, left + columns + right), fill, dtype=values.dtype)
    part = whole[above : above + rows, left : left + columns]
    return part.copy_(values)


def frame_is_untouched(part: torch.Tensor, fill: float) -> bool:
    """Nothing but `part` differs from `fill` in the matrix it was cut from."""
    assert part._base is not None
    whole = part._base.clone()
    whole.as_strided(part.shape, part.stride(), part.storage_offset()).fill_(fill)
    return bool((whole == fill).all())


def make_tile(rows: int, columns: int, seed: int, cap: float | None = None) -> torch.Tensor:
    """Random tile [rows, columns], before the cap. The first and the last columns have much of the probability, so that
    their errors show."""
    tile = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 3
    tile[:, 0] += 5
    tile[:, -1] += 5
    return tile if cap is None else tile / 5


def make_ids(rows: int, columns: int, seed: int) -> torch.Tensor:
    ids = torch.randint(0, columns, (rows,), generator=torch.Generator().manual_seed(seed))
    ids[:1] = columns - 1
    return ids


def logits(tile: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Logits of a tile, both [rows, columns]."""
    return tile if cap is None else cap * torch.tanh(tile)


def picked(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Entries [rows] of `values` [rows, columns] at `ids` [rows]."""
    return values.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def entropy_of(logprobs: torch.Tensor) -> torch.Tensor:
    """Entropies [rows] of log-probabilities [rows, columns]."""
    return -(logprobs.exp() * logprobs).sum(-1)


def gradient_of(total: torch.Tensor, tile: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Gradient [rows, columns] with respect to `a x / tau`, of which the tile is 1 / `cap`."""
    return torch.autograd.grad(total, tile)[0].detach() / (1.0 if cap is None else cap)


def assert_all_accurate(names, ours, exact, native) -> None:
    for name, *tensors in zip(names, ours, exact, native, strict=True):
        assert_accurate(name, *tensors)
