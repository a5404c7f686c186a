"""Intervals of log-probabilities from int8 products, tile by tile (`reference/certified.py` has the formulas)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch.nn import functional

from unisd_kernels.backends import extension
from unisd_kernels.backends.buffers import row_major
from unisd_kernels.backends.transform import LogitTransform
from unisd_kernels.certified.int8_head import Int8Head, int8_codes, padded

# Columns of a larger approximate probability get exact logits.
THRESHOLD = 1e-4
# Rows that share their exact columns: one product with the union of them.
_BLOCK = 48
# A tile stays in the second-level cache.
_ROWS, _COLUMNS = 5 * _BLOCK, 1024
# Rows whose coordinates are float64 at a time.
_NATIVE_ROWS = 4096
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
    hidden: torch.Tensor,
    ready: Int8Head,
    target_ids: torch.Tensor,
    threshold: float = THRESHOLD,
    impl: Literal["native", "torch"] = "torch",
) -> LogProbBounds:
    """Bounds of the log-probability of the target ids [N] at temperature 1.

    One int8 product, one of a few directions, and exact products for the columns whose share of the probability of the
    columns so far is above the threshold; in PyTorch in one of the rows of a block.

    Args:
        impl: the C++ kernel, which takes no float64, or PyTorch operations.
    """
    out = LogProbBounds(*(torch.empty(len(hidden), dtype=ready.lead.dtype) for _ in range(2)))
    statistics, step = (_native_statistics, _NATIVE_ROWS) if impl == "native" else (_torch_statistics, _ROWS)
    for start in range(0, len(hidden), step):
        rows = slice(start, start + step)
        coded = _CodedRows.of(hidden[rows], ready, target_ids[rows].long())
        out.lower[rows], out.upper[rows] = _interval(coded, statistics(coded, ready, threshold), ready)
    return out


class _CodedRows(NamedTuple):
    """Rows in the notation of `reference/certified.py`."""

    hidden: torch.Tensor  # [rows, H], as it is
    codes: torch.Tensor  # int8 [rows, padded(H)]
    scales: torch.Tensor  # [rows]
    along: torch.Tensor  # P^T h [rows, r]
    entry: torch.Tensor  # e [rows]
    whole: torch.Tensor  # D [rows]
    target: torch.Tensor  # exact logit [rows]

    @classmethod
    def of(cls, hidden: torch.Tensor, ready: Int8Head, target_ids: torch.Tensor) -> _CodedRows:
        dtype, head = ready.lead.dtype, ready.head
        wide = hidden.double()
        rows = wide @ ready.inverse
        codes, scales = int8_codes(rows)
        scales = scales.to(dtype)
        left = torch.addcmul(rows, codes.double(), scales.double().unsqueeze(-1), value=-1)
        entry, whole = (error.to(dtype) for error in _errors(ready, rows, left))
        target = torch.linalg.vecdot(hidden.to(dtype), head.active_weight.index_select(0, target_ids).to(dtype))
        target = _finish(target.unsqueeze(-1), ready, target_ids.unsqueeze(-1)).squeeze(-1)
        codes = functional.pad(codes, (0, padded(hidden.shape[1]) - hidden.shape[1]))
        return cls(hidden, codes, scales, (wide @ ready.directions).to(dtype), entry, whole, target)


class _Statistics(NamedTuple):
    """[rows] each, in units of exp(highest): sums over all columns (total), those without an exact logit (rest), their
    squares and the largest of them at most, and that of exact logits over the others (sure)."""

    highest: torch.Tensor
    total: torch.Tensor
    rest: torch.Tensor
    squares: torch.Tensor
    sure: torch.Tensor
    largest: torch.Tensor


def _native_statistics(rows: _CodedRows, ready: Int8Head, threshold: float) -> _Statistics:
    """By `int8_score` (csrc/cpu/int8_score.h)."""
    head, log_threshold = ready.head, math.log(threshold)
    transform = LogitTransform.of(head, 1.0)
    sums = torch.empty(len(_Statistics._fields), len(rows.hidden))
    extension.operations().int8_score(
        rows.codes,
        rows.scales,
        rows.along,
        # Of a column that the target stands above far enough no one asks.
        rows.target + log_threshold,
        row_major(rows.hidden),
        ready.codes,
        ready.scales,
        ready.offsets,
        ready.lead,
        row_major(head.active_weight),
        None if head.active_bias is None else head.active_bias.float().contiguous(),
        transform.product_scale,
        transform.tanh_scale,
        log_threshold,
        sums,
    )
    highest, total, rest, squares, sure, floor = sums
    # A hair more than the floor, which is rounded. No share is above 1.
    largest = (floor - highest + 1e-4).clamp(max=0.0).exp()
    return _Statistics(highest, total, rest, squares, sure, largest)


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


def _torch_statistics(rows: _CodedRows, ready: Int8Head, threshold: float) -> _Statistics:
    dtype, columns, num_rows = ready.lead.dtype, len(ready.codes), len(rows.hidden)
    sums = _Sums.none(num_rows, dtype)
    is_exact = torch.zeros(-(-num_rows // _BLOCK), columns, dtype=torch.bool)
    for start in range(0, columns, _COLUMNS):
        tile = slice(start, min(start + _COLUMNS, columns))
        logits = torch._int_mm(rows.codes, ready.codes[tile].T) * rows.scales.unsqueeze(-1)
        logits.mul_(ready.scales[tile]).addmm_(rows.along, ready.lead[tile].T)
        sums.add(_finish(logits, ready, tile), is_exact[:, tile], threshold)

    narrow, head = rows.hidden.to(dtype), ready.head
    sure = torch.zeros_like(sums.rest)
    for block, part in enumerate(range(0, num_rows, _BLOCK)):
        place = slice(part, part + _BLOCK)
        chosen = is_exact[block].nonzero().squeeze(-1)
        exact = _finish(narrow[place] @ head.active_weight.index_select(0, chosen).to(dtype).T, ready, chosen)
        sure[place] = (exact - sums.highest[place].unsqueeze(-1)).exp_().sum(-1)
    # No share in `rest` is above the threshold times a total that only grew.
    return _Statistics(sums.highest, sums.total, sums.rest, sums.squares, sure, threshold * sums.total)


def _interval(rows: _CodedRows, sums: _Statistics, ready: Int8Head) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower and upper bounds [rows]."""
    dtype, columns = ready.lead.dtype, len(ready.codes)
    entry, whole, rest, sure = rows.entry, rows.whole, sums.rest, sums.sure
    target = rows.target - sums.highest
    # Squares underflow before their sum does.
    squares = sums.squares + columns * torch.finfo(dtype).tiny
    first = torch.minimum(whole * squares.sqrt(), entry * rest)
    # In float64, where exp(e) - 1 - e keeps its digits for a small e.
    fine = entry.double().clamp(min=1e-5)
    curve = ((torch.expm1(fine) - fine) / fine.square()).to(dtype)
    second = curve * torch.minimum(entry.square() * rest, whole.square() * sums.largest)
    most = sure + torch.minimum(rest + first + second, rest * entry.exp())
    least = sure + torch.maximum(rest - first, rest * (-entry).exp())
    slack = _ROUNDING[dtype] * (1.0 + sums.highest.abs() + target.abs())
    hopeless = entry > _LARGEST_ERROR  # False for NaN, which stays
    lower = (target - most.log() - slack).masked_fill_(hopeless, -torch.inf)
    return lower, (target - least.log() + slack).clamp_(max=0.0).masked_fill_(hopeless, 0.0)


def _errors(ready: Int8Head, rows: torch.Tensor, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e and D [rows], from h' and r in float64."""
    length, rounded = rows.norm(dim=-1), left.norm(dim=-1)
    entry = ready.residual_length * length + ready.code_length * rounded
    narrow = left.to(ready.gram.dtype)
    squares = torch.linalg.vecdot(narrow @ ready.gram, narrow).double() + ready.gram_rounding * rounded.square()
    squares = (ready.residual_norm * length).square() + squares.clamp(min=0.0)
    whole = (squares + 2 * ready.cross_norm * length * rounded).sqrt()
    scale, bias = abs(ready.head.logit_scale), ready.head.active_bias
    if bias is not None and not bool(bias.isfinite().all()):
        scale = math.nan  # as the exact score is then
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
