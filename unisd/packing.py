"""The completion tokens of a micro-batch that count, packed without padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unisd_kernels import pack_rows


@dataclass(frozen=True)
class CompletionRows:
    """The N completion tokens of a micro-batch that count, and where they sit in its [B, T] positions.

    Attributes:
        positions: [N] indices into B * T.
        ids: [N] the sampled tokens.
        cu_seqlens: [B + 1].
    """

    positions: torch.Tensor
    ids: torch.Tensor
    cu_seqlens: torch.Tensor

    @classmethod
    def of(cls, mask: torch.Tensor, completion_ids: torch.Tensor) -> CompletionRows:
        positions = torch.arange(mask.numel(), device=mask.device).view_as(mask)
        positions, ids, cu_seqlens = pack_rows(mask, positions, completion_ids)
        return cls(positions, ids, cu_seqlens)

    def to(self, device: torch.device) -> CompletionRows:
        return CompletionRows(self.positions.to(device), self.ids.to(device), self.cu_seqlens.to(device))

    def take(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, T, H] to [N, H], on the device of the rows: a model split over devices may end elsewhere."""
        rows = hidden.flatten(0, 1).index_select(0, self.positions.to(hidden.device))
        return rows.to(self.ids.device)
