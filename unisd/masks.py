"""Which tokens of a completion count in the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def loss_mask(
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    *,
    end_ids: Sequence[int],
    mask_truncated: bool,
    skip_first: int,
) -> torch.Tensor:
    """[B, T] int64: 1 where a token counts.

    The attention mask stays as it is: what does not count is read all the same.

    Args:
        completion_ids, completion_mask: [B, T], padded on the right.
        end_ids: tokens that end a completion.
        mask_truncated: leave out every token of a completion whose last one is no end token.
        skip_first: leave out so many tokens at the start of each.
    """
    counted = completion_mask.clone()
    counted[:, :skip_first] = 0
    if mask_truncated:
        counted.masked_fill_(truncated(completion_ids, completion_mask, end_ids).unsqueeze(1), 0)
    return counted


def truncated(completion_ids: torch.Tensor, completion_mask: torch.Tensor, end_ids: Sequence[int]) -> torch.Tensor:
    """[B] bool: completions that do not end with an end token; not those without any token."""
    lengths = completion_mask.sum(1)
    last = completion_ids.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    ends = torch.isin(last, torch.tensor(list(end_ids), device=last.device, dtype=last.dtype))
    return ~ends & (lengths > 0)


def most_entropic(entropies: torch.Tensor, share: float) -> torch.Tensor:
    """[n] ascending places of the ceil(share N) largest of N entropies, the first of equal ones."""
    count = max(1, -int(-share * entropies.numel() // 1)) if entropies.numel() else 0
    order = torch.sort(entropies, descending=True, stable=True).indices
    return order[:count].sort().values
