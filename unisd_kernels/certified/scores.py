"""Intervals of log-probabilities from int8 products, tile by tile (`reference/certified.py` has the formulas)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from unisd_kernels.certified.int8_head import Int8Head, int8_codes

# Columns of a larger approximate probability get exact logits.
THRESHOLD = 1e-4
# Rows that share their exact columns: one product with the union of them.
_BLOCK = 48
# A tile stays in the second-level cache.
_ROWS, _COLUMNS = 5 * _BLOCK, 1024
# Nats by which a logit may be off at most; beyond it the row has no bounds but minus infinity and 0. What underflows
# among the approximate probabilities is then nothing beside the others, whatever the errors.
_LARGEST_ERROR = 20.0
# What arithmetic adds to a log-probability, in units of 1 + the largest logit.
_ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-13}


class LogProbBounds(NamedTuple):
    """[N] each, float32 (float64 for float64): the exact log-probability is between the two."""

    lower: torch.Tensor
    upper: torch.Tensor

    @property
    def middle(self) -> torch.Tensor:
        return (self.lower + self.upper) / 2


@torch.no_grad()
def logprob_bounds(
    hidden: torch.Tensor, ready: Int8Head, target_ids: torch.Tensor, threshold: float = THRESHOLD
) -> LogProbBounds:
    """Bounds of the log-probability of the target ids [N] at temperature 1.

    One int8 product, one of a few directions, and exact products for the columns whose share of the probability of the
    columns so far is above the threshold in one of the rows of a block.
    """
    out = LogProbBounds(*(torch.empty(len(hidden), dtype=ready.lead.dtype) for _ in range(2)))
    for start in range(0, len(hidden), _ROWS):
        rows = slice(start, start + _ROWS)
        out.lower[rows], out.upper[rows] = _bounds(hidden[rows], ready, target_ids[rows].long(), threshold)
    return out


@dataclass
class _Sums:
    """Over the columns so far, in units of exp(highest); `rest` and below without those that get exact logits."""

    highest: torch.Tensor  # largest approximate logit
    total: torch.Tensor
    rest: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def none(cls, num_rows: int, dtype: torch.dtype) -> _Sums:
        zeros = (torch.zeros(num_rows, dtype=dtype) for _ in range(3))
        return cls(torch.full((num_rows,), -torch.inf, dtype=dtype), *zeros)

    def add(self, logits: torch.Tensor, is_exact: torch.Tensor, threshold: float) -> None:
        """A tile [rows, columns], which is overwritten; tells which columns get exact logits, [blocks, columns]."""
        highest = torch.maximum(self.highest, logits.amax(-1))
        scale, self.highest = (self.highest - highest).exp(), highest
        share = logits.sub_(highest.unsqueeze(-1)).exp_()
        self.total = self.total * scale + share.sum(-1)
        large = share > (threshold * self.total).unsqueeze(-1)
        for block, (rows, chosen) in enumerate(zip(share.split(_BLOCK), large.split(_BLOCK), strict=True)):
            torch.any(chosen, 0, out=is_exact[block])
            rows.masked_fill_(is_exact[block], 0.0)
        self.rest = self.rest * scale + share.sum(-1)
        self.squares = self.squares * scale.square() + torch.linalg.vecdot(share, share)


def _bounds(
    hidden: torch.Tensor, ready: Int8Head, target_ids: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower and upper bounds [rows]."""
    dtype, columns = ready.lead.dtype, len(ready.codes)
    wide = hidden.double()
    rows = wide @ ready.inverse
    codes, scales = int8_codes(rows)
    entry, whole = (error.to(dtype) for error in _errors(ready, rows, rows - codes.double() * scales.unsqueeze(-1)))
    row_scales, along = scales.to(dtype).unsqueeze(-1), (wide @ ready.directions).to(dtype)
    sums = _Sums.none(len(hidden), dtype)
    is_exact = torch.zeros(-(-len(hidden) // _BLOCK), columns, dtype=torch.bool)
    for start in range(0, columns, _COLUMNS):
        tile = slice(start, min(start + _COLUMNS, columns))
        logits = _product(codes, ready.codes[tile]) * row_scales
        logits.mul_(ready.scales[tile]).addmm_(along, ready.lead[tile].T)
        sums.add(_finish(logits, ready, tile), is_exact[:, tile], threshold)

    narrow, head = hidden.to(dtype), ready.head
    sure = torch.zeros_like(sums.rest)
    for block, part in enumerate(range(0, len(hidden), _BLOCK)):
        place = slice(part, part + _BLOCK)
        chosen = is_exact[block].nonzero().squeeze(-1)
        exact = _finish(narrow[place] @ head.active_weight.index_select(0, chosen).to(dtype).T, ready, chosen)
        sure[place] = (exact - sums.highest[place].unsqueeze(-1)).exp_().sum(-1)
    target = torch.linalg.vecdot(narrow, head.active_weight.index_select(0, target_ids).to(dtype)).unsqueeze(-1)
    target = _finish(target, ready, target_ids.unsqueeze(-1)).squeeze(-1) - sums.highest

    rest = sums.rest
    # Squares underflow before their sum does.
    squares = sums.squares + columns * torch.finfo(dtype).tiny
    first = torch.minimum(whole * squares.sqrt(), entry * rest)
    # In float64, where exp(e) - 1 - e keeps its digits for a small e. No share in `rest` is above the threshold times a
    # total that only grew.
    fine = entry.double().clamp(min=1e-5)
    curve = ((torch.expm1(fine) - fine) / fine.square()).to(dtype)
    second = curve * torch.minimum(entry.square() * rest, whole.square() * (threshold * sums.total))
    most = sure + torch.minimum(rest + first + second, rest * entry.exp())
    least = sure + torch.maximum(rest - first, rest * (-entry).exp())
    slack = _ROUNDING[dtype] * (1.0 + sums.highest.abs() + target.abs())
    hopeless = entry > _LARGEST_ERROR  # False for NaN, which stays
    lower = (target - most.log() - slack).masked_fill_(hopeless, -torch.inf)
    return lower, (target - least.log() + slack).clamp_(max=0.0).masked_fill_(hopeless, 0.0)


def _product(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """int32 [rows, columns] of int8 codes."""
    if rows.shape[1] == 1:
        # torch 2.13's product is wrong for it: it cannot tell which of the two is transposed.
        return rows.int() * columns.int().T
    return torch._int_mm(rows, columns.T)


def _errors(ready: Int8Head, rows: torch.Tensor, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e and D [rows], from h' and r in float64."""
    length, rounded = rows.norm(dim=-1), left.norm(dim=-1)
    entry = ready.residual_length * length + ready.code_length * rounded
    squares = (ready.residual_norm * length).square() + torch.linalg.vecdot(left @ ready.gram, left).clamp(min=0.0)
    whole = (squares + 2 * ready.cross_norm * length * rounded).sqrt()
    scale = abs(ready.head.logit_scale)
    return scale * entry, scale * whole


def _finish(products: torch.Tensor, ready: Int8Head, columns: slice | torch.Tensor) -> torch.Tensor:
    """Logits from raw products, in place: bias, scale, cap. `columns`: which they are, the same or one for each row."""
    head = ready.head
    if head.active_bias is not None:
        products.add_(head.active_bias[columns])
    if head.logit_scale != 1.0:
        products.mul_(head.logit_scale)
    if head.softcap is not None:
        products.div_(head.softcap).tanh_().mul_(head.softcap)
    return products
