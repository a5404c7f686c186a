"""Slices of a vocabulary over the ranks of a process group: which columns of a head are where."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import distributed

from unisd_kernels.collectives import gathered

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

# Codes of the dtypes in what the ranks tell each other.
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class _Slice(NamedTuple):
    """What a rank tells the others of its slice; numbers that float64 holds."""

    start: float
    rows: float
    width: float
    dtype: float
    has_bias: float
    vocab_size: float  # -1: none
    logit_scale: float
    softcap: float  # 0: none


# What must be the same on all ranks, and how it is called.
_COMMON = {
    "width": "hidden sizes",
    "dtype": "dtypes",
    "has_bias": "biases (some have none)",
    "vocab_size": "vocab_size",
    "logit_scale": "logit_scale",
    "softcap": "softcap",
}


@dataclass(frozen=True, eq=False)
class VocabShard:
    """This rank's slice of a vocabulary, of which padding is already left out.

    Attributes:
        group: the ranks that hold slices.
        rank: this one's place in `bounds`.
        bounds: (first column, end) of each rank's slice. An empty one is (start, start).
        num_rows: rows of all ranks' weights, with the padding.
    """

    group: ProcessGroup
    rank: int
    bounds: tuple[tuple[int, int], ...]
    num_rows: int

    @classmethod
    def agree(
        cls,
        group: ProcessGroup,
        start: int,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        vocab_size: int | None,
        logit_scale: float,
        softcap: float | None,
    ) -> VocabShard:
        """Let all ranks of the group tell each other what they hold. A collective call: every rank makes it, and a
        mistake raises the same error on all of them.

        Raises:
            ValueError: the slices do not tile a vocabulary, or are not of one head.
        """
        own = _Slice(
            start,
            weight.shape[0],
            weight.shape[1],
            _DTYPES.index(weight.dtype),
            bias is not None,
            -1 if vocab_size is None else vocab_size,
            logit_scale,
            softcap or 0.0,
        )
        told = torch.tensor(own, dtype=torch.float64, device=weight.device)
        slices = [_Slice(*row) for row in gathered(told, group).tolist()]
        for field, name in _COMMON.items():
            values = [getattr(each, field) for each in slices]
            if len(set(values)) > 1:
                shown = [str(_DTYPES[int(value)]) for value in values] if field == "dtype" else values
                raise ValueError(
                    f"the ranks' slices of the vocabulary differ in their {name}: {shown}; they are of one head"
                )
        ranges = [(int(each.start), int(each.start + each.rows)) for each in slices]
        _check_tiling(ranges)
        total = max(end for _, end in ranges)
        real = total if vocab_size is None else vocab_size
        if not 0 < real <= total:
            raise ValueError(
                f"LMHead.vocab_size must be between 1 and the {total} rows of all ranks' weights, got {vocab_size}"
            )
        bounds = tuple((min(start, real), min(end, real)) for start, end in ranges)
        return cls(group, group.rank(), bounds, total)

    @property
    def start(self) -> int:
        """First column."""
        return self.bounds[self.rank][0]

    @property
    def num_columns(self) -> int:
        """Columns on this rank."""
        start, end = self.bounds[self.rank]
        return end - start

    @property
    def total_columns(self) -> int:
        """Columns of the whole vocabulary."""
        return sum(end - start for start, end in self.bounds)

    @property
    def most_columns(self) -> int:
        """Columns of the widest slice, by which all ranks choose how many rows they take at a time."""
        return max(end - start for start, end in self.bounds)

    def is_like(self, other: VocabShard | None) -> bool:
        """Whether the other head is in the same slices on the same ranks."""
        if other is None or self.bounds != other.bounds:
            return False
        ranks = (distributed.get_process_group_ranks(shard.group) for shard in (self, other))
        return self.group is other.group or next(ranks) == next(ranks)

    def all_reduce(self, values: torch.Tensor, maximum: bool = False) -> None:
        """Sums, or maxima, over the ranks, in place: one message."""
        operation = distributed.ReduceOp.MAX if maximum else distributed.ReduceOp.SUM
        distributed.all_reduce(values, operation, group=self.group)

    def start_sum(self, values: torch.Tensor) -> Work:
        """Begin to add up over the ranks, in place: one message. Until its `wait()` nobody reads or writes `values`."""
        work = distributed.all_reduce(values, distributed.ReduceOp.SUM, group=self.group, async_op=True)
        assert work is not None  # it is for a rank that is not of the group
        return work

    def count_below(self, columns: int, rank: int | None = None) -> int:
        """How many of the first `columns` columns are on a rank; None for this one."""
        start, end = self.bounds[self.rank if rank is None else rank]
        return max(0, min(end, columns) - start)

    def gather_columns(self, values: torch.Tensor, columns: int) -> torch.Tensor:
        """[rows, columns] of all ranks' [rows, `count_below(columns)`], on every rank."""
        counts = [self.count_below(columns, rank) for rank in range(len(self.bounds))]
        padded = values.new_zeros(values.shape[0], max(counts))
        padded[:, : values.shape[1]] = values
        parts = gathered(padded, self.group)
        order = sorted(range(len(counts)), key=lambda rank: self.bounds[rank])
        return torch.cat([parts[rank][:, : counts[rank]] for rank in order], 1)

    def local_ids(self, target_ids: torch.Tensor) -> torch.Tensor:
        """Ids in the whole vocabulary as ids of this slice; -1 where another rank has the column."""
        local = target_ids - self.start
        return torch.where((local >= 0) & (local < self.num_columns), local, -1)


def _check_tiling(ranges: list[tuple[int, int]]) -> None:
    """Raise unless the ranges that are not empty are, in some order, all of a vocabulary."""
    ordered = sorted(each for each in ranges if each[0] < each[1])
    if not ordered:
        raise ValueError("no rank holds a row of the head's weight: the slices of the vocabulary are all empty")
    if ordered[0][0] != 0:
        raise ValueError(f"the ranks' slices of the vocabulary must begin at column 0, got {ranges}")
    for (_, end), (start, _) in itertools.pairwise(ordered):
        if start != end:
            what = "overlap" if start < end else "leave a gap"
            raise ValueError(
                f"the ranks' slices of the vocabulary {what} at column {min(start, end)}: got {ranges} as "
                "(vocab_start, vocab_start + rows of the weight); they must tile the vocabulary"
            )
