"""Intervals of scores from rounded operands, as `python -m bench certificate` compares them (no scale, bias or cap)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from unisd_kernels import LMHead
from unisd_kernels.certified.agreement import settled
from unisd_kernels.certified.int8_head import Int8Head
from unisd_kernels.certified.scores import LogProbBounds
from unisd_kernels.reference.certified import int8_rows

TOLERANCES = (0.01, 0.05, 0.1)
# Values [n, H] in float64 to codes times scales, row by row.
Rounding = Callable[[torch.Tensor], torch.Tensor]


class Coordinates(NamedTuple):
    """P, W P, T^-1 (I - P P^T) and what comes of the weight in them: codes times scales (float32), the norms of
    `reference/certified.py`, the codes' Gram matrix or one that is above it, and where they are asked for the lengths
    [V] of every row of R and of the codes."""

    directions: torch.Tensor
    lead: torch.Tensor
    inverse: torch.Tensor
    codes: torch.Tensor
    residual_length: float
    code_length: float
    residual_norm: float
    cross_norm: float
    gram: torch.Tensor
    lengths: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def plain(cls, head: LMHead) -> Coordinates:
        """The weight as it is, in int8."""
        weight = head.active_weight
        unit, none = torch.eye(weight.shape[1], dtype=torch.float64), weight.new_zeros(weight.shape[1], 0)
        codes = int8_rows(weight)
        residual = weight - codes
        return cls(
            none.double(),
            weight @ none,
            unit,
            codes,
            float(residual.norm(dim=1).amax()),
            float(codes.norm(dim=1).amax()),
            float(torch.linalg.matrix_norm((residual.T @ residual).double(), 2).sqrt()),
            float(torch.linalg.matrix_norm(residual.T @ codes, 2)),
            (codes.T @ codes).double(),
        )

    @classmethod
    def of(cls, ready: Int8Head) -> Coordinates:
        """Those of the package."""
        return cls(
            ready.directions,
            ready.lead,
            ready.inverse,
            ready.codes.float() * ready.scales.unsqueeze(-1),
            ready.residual_length,
            ready.code_length,
            ready.residual_norm,
            ready.cross_norm,
            ready.gram.double(),
        )

    @classmethod
    def rounded(
        cls,
        head: LMHead,
        directions: torch.Tensor,
        transform: torch.Tensor,
        inverse: torch.Tensor,
        rounding: Rounding,
    ) -> Coordinates:
        """Any P, T and T^-1 (as `directions_and_transform` has them), and any rounding."""
        weight = head.active_weight.double()
        left = torch.eye(weight.shape[1], dtype=torch.float64) - directions @ directions.T
        turned = weight @ (left @ transform)
        codes = rounding(turned)
        residual = turned - codes
        return cls(
            directions,
            (weight @ directions).float(),
            left @ inverse.T,
            codes.float(),
            float(residual.norm(dim=1).amax()),
            float(codes.norm(dim=1).amax()),
            float(torch.linalg.eigvalsh(residual.T @ residual)[-1].clamp(min=0.0).sqrt()),
            float(torch.linalg.matrix_norm(residual.T @ codes, 2)),
            codes.T @ codes,
            (residual.norm(dim=1), codes.norm(dim=1)),
        )

    def with_few_eigenvectors(self, count: int) -> Coordinates:
        """A Gram matrix that costs a product with `count` columns in place of H: the other eigenvalues are taken for
        the largest of them, so that r gram r is no smaller than it was."""
        values, vectors = torch.linalg.eigh(self.gram)
        values[:-count] = values[-count - 1]
        return self._replace(gram=(vectors * values) @ vectors.T)


class RowScores(NamedTuple):
    """Approximate and exact scores of n rows, float64, in the notation of `reference/certified.py`."""

    reference: torch.Tensor  # log-sum-exp of the approximate logits [n]
    share: torch.Tensor  # q [n, V]
    entry: torch.Tensor  # e [n]
    whole: torch.Tensor  # D [n]
    logits: torch.Tensor  # exact [n, V]
    target: torch.Tensor  # exact [n]
    approximate_target: torch.Tensor  # [n]
    entries: torch.Tensor | None = None  # e of each column by its own lengths [n, V]

    @classmethod
    def of(
        cls, hidden: torch.Tensor, head: LMHead, ids: torch.Tensor, at: Coordinates, rounding: Rounding
    ) -> RowScores:
        logits = (hidden @ head.active_weight.T).double()
        rows = hidden.double() @ at.inverse
        codes = rounding(rows)
        left = rows - codes
        along = (hidden.double() @ at.directions).float()
        approximate = (codes.float() @ at.codes.T + along @ at.lead.T).double()
        length, rounded = rows.norm(dim=-1), left.norm(dim=-1)
        squares = (at.residual_norm * length).square() + torch.linalg.vecdot(left @ at.gram, left)
        reference = approximate.logsumexp(-1)
        place = ids.unsqueeze(-1)
        return cls(
            reference,
            (approximate - reference.unsqueeze(-1)).exp(),
            at.residual_length * length + at.code_length * rounded,
            (squares + 2 * at.cross_norm * length * rounded).sqrt(),
            logits,
            logits.gather(-1, place).squeeze(-1),
            approximate.gather(-1, place).squeeze(-1),
            None if at.lengths is None else length.outer(at.lengths[0]) + rounded.outer(at.lengths[1]),
        )

    @property
    def exact(self) -> torch.Tensor:
        """Log-probabilities [n]."""
        return self.target - self.logits.logsumexp(-1)

    @property
    def error(self) -> torch.Tensor:
        """How far the approximate log-sum-exp is off, [n]."""
        return (self.reference - self.logits.logsumexp(-1)).abs()

    def simple_interval(self) -> LogProbBounds:
        """By the largest error of a logit alone."""
        middle = self.approximate_target - self.reference
        return LogProbBounds(middle - 2 * self.entry, (middle + 2 * self.entry).clamp(max=0.0))

    def interval(self, is_exact: torch.Tensor, largest: float | torch.Tensor | None) -> LogProbBounds:
        """With exact logits of the target and of some columns.

        Args:
            is_exact: bool [n, V].
            largest: no less than the largest q of the other columns; None for a bound by e alone.
        """
        entry, whole = self.entry, self.whole
        sure = torch.where(is_exact, (self.logits - self.reference.unsqueeze(-1)).exp(), 0.0).sum(-1)
        share = self.share.masked_fill(is_exact, 0.0)
        rest = share.sum(-1)
        most, least = sure + rest * entry.exp(), sure + rest * (-entry).exp()
        if largest is not None:
            first = torch.minimum(whole * share.norm(dim=-1), entry * rest)
            curve = (torch.expm1(entry) - entry) / entry.square()
            second = curve * torch.minimum(entry.square() * rest, whole.square() * largest)
            most, least = torch.minimum(most, sure + rest + first + second), torch.maximum(least, sure + rest - first)
        return self._between(least, most)

    def interval_by_column(self, is_exact: torch.Tensor) -> LogProbBounds:
        """As `interval`, with an e for each column: what is left after the linear term is, for c(e) = (exp(e) - 1 - e)
        / e^2, at most sum_j q_j c(e_j) e_j^2, and at most D^2 max_j q_j c(e_j)."""
        assert self.entries is not None
        sure = torch.where(is_exact, (self.logits - self.reference.unsqueeze(-1)).exp(), 0.0).sum(-1)
        share, entries = self.share.masked_fill(is_exact, 0.0), self.entries
        rest = share.sum(-1)
        first = torch.minimum(self.whole * share.norm(dim=-1), (share * entries).sum(-1))
        left = torch.expm1(entries) - entries
        curved = (share * left / entries.clamp(min=1e-150).square()).amax(-1)
        second = torch.minimum((share * left).sum(-1), self.whole.square() * curved)
        most = torch.minimum(rest + first + second, (share * entries.exp()).sum(-1))
        least = torch.maximum(rest - first, (share * (-entries).exp()).sum(-1))
        return self._between(sure + least, sure + most)

    def _between(self, least: torch.Tensor, most: torch.Tensor) -> LogProbBounds:
        """From bounds of the sum over the columns, in units of exp(reference)."""
        at = self.target - self.reference
        return LogProbBounds(at - most.log(), (at - least.log()).clamp(max=0.0))


def spread_of(bounds: LogProbBounds, scores: torch.Tensor) -> dict[str, float]:
    """Half widths, and how far an exact score is outside at most (below 0: inside)."""
    half = (bounds.upper - bounds.lower) / 2
    return {
        "half_width_median": float(half.median()),
        "half_width_p90": float(half.quantile(0.9)),
        "half_width_max": float(half.max()),
        "largest_outside": float(torch.maximum(bounds.lower - scores, scores - bounds.upper).max()),
    }


def rescored(bounds: LogProbBounds, scores: torch.Tensor) -> dict[str, float]:
    """Share of the tokens scored again for each tolerance; [K, N] all, gamma = 1, token level, variance."""
    found = {}
    for tolerance in TOLERANCES:
        copied = LogProbBounds(bounds.lower.clone(), bounds.upper.clone())
        cu_seqlens = torch.tensor([0, scores.shape[1]])
        done = settled(copied, lambda places: scores[:, places], cu_seqlens, tolerance=tolerance, gamma=1.0)
        found[str(tolerance)] = float(done.rescored.double().mean())
    return found
