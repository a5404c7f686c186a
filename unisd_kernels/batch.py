"""`Batch`: the batch that rows belong to, of which other ranks may hold other rows: its counts, sums and quantiles."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import distributed

from unisd_kernels.collectives import gathered
from unisd_kernels.packing import sequence_lengths


@dataclass(frozen=True)
class Batch:
    """One batch of packed rows, of which this rank holds N in B sequences.

    Every method is a collective where its group is given: all ranks of the group call it, those without a row too. What
    comes back has the same bits on all of them, because each adds up the same numbers in the order of the ranks.

    Attributes:
        num_rows, num_sequences: of the whole batch.
        lengths: [B] int64, rows of this rank's sequences on all ranks that hold rows of them.
        row_counts: rows on each rank of `row_group`.
        row_group: its ranks hold the rows of the batch; None: they are all here.
        sequence_group: its ranks hold rows of the same B sequences, in the same order; None: the sequences are whole.
    """

    num_rows: int
    num_sequences: int
    lengths: torch.Tensor
    row_counts: tuple[int, ...] = ()
    row_group: distributed.ProcessGroup | None = None
    sequence_group: distributed.ProcessGroup | None = None

    @classmethod
    def of(
        cls,
        cu_seqlens: torch.Tensor,
        num_rows: int,
        row_group: distributed.ProcessGroup | None = None,
        sequence_group: distributed.ProcessGroup | None = None,
        call: object = None,
    ) -> Batch:
        """The batch of the rows that `cu_seqlens` [B + 1] lays out; without a group, these.

        Args:
            row_group: None for `sequence_group`, of which it must hold every rank.
            call: what the ranks have to agree on, or they would wait for messages that nobody sends: its `repr`.

        Raises:
            ValueError, on all ranks of the group: `call` differs, or the number of sequences in `sequence_group`.
        """
        num_sequences, lengths = cu_seqlens.numel() - 1, sequence_lengths(cu_seqlens)
        row_group = sequence_group if row_group is None else row_group
        if row_group is None:
            return cls(num_rows, num_sequences, lengths)
        device = cu_seqlens.device
        counts_here = True
        if sequence_group is not None:
            found = gathered(torch.tensor([num_sequences], device=device), sequence_group).flatten().tolist()
            if len(set(found)) > 1:
                raise ValueError(
                    f"the ranks of sequence_group have {found} sequences, and they must hold rows of the same ones: "
                    "cu_seqlens has an entry for each on every rank, also where a rank has no row of it"
                )
            lengths = gathered(lengths, sequence_group).sum(0)
            counts_here = distributed.get_rank(sequence_group) == 0  # a sequence counts once
        message = [num_rows, num_sequences if counts_here else 0, zlib.crc32(repr(call).encode())]
        told = gathered(torch.tensor(message, device=device), row_group).tolist()
        others = [rank for rank, (_, _, other) in enumerate(told) if other != told[0][2]]
        if others:
            raise ValueError(
                f"rank {others[0]} of row_group was called otherwise than rank 0; settings, dtypes and the number of "
                f"views must be the same on all ranks. Here: {call}"
            )
        row_counts = tuple(rows for rows, _, _ in told)
        return cls(
            sum(row_counts),
            sum(sequences for _, sequences, _ in told),
            lengths,
            row_counts,
            row_group,
            sequence_group,
        )

    def gathered(self, values: torch.Tensor) -> torch.Tensor:
        """[num_rows], the values [N] of all rows in the order of the ranks. One message of the longest rank's N."""
        if self.row_group is None:
            return values
        padded = values.new_zeros(max(self.row_counts))
        padded[: values.numel()] = values.detach()
        ranks = gathered(padded, self.row_group)
        return torch.cat([rank[:count] for rank, count in zip(ranks, self.row_counts, strict=True)])

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of the values [N] of all rows, 0-dim. One message of one number."""
        if self.row_group is None:
            return values.sum()
        wide = values.detach().to(torch.float64).sum()
        return gathered(wide.reshape(1), self.row_group).sum().to(values.dtype)

    def over_sequences(self, sums: torch.Tensor) -> torch.Tensor:
        """[..., B] sums over whole sequences from those over this rank's rows of them. One message of their size."""
        if self.sequence_group is None:
            return sums
        return gathered(sums.detach().to(torch.float64), self.sequence_group).sum(0).to(sums.dtype)


def check_groups(row_group: object, sequence_group: object) -> None:
    """Raise TypeError for what is no process group, ValueError for one that this process is not in."""
    for name, group in (("row_group", row_group), ("sequence_group", sequence_group)):
        if group is None:
            continue
        if distributed.is_available() and group == distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"this process is not in {name}; only its ranks may call with it")
        if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
            raise TypeError(
                f"{name} must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}; a mesh gives "
                "one by DeviceMesh.get_group"
            )
