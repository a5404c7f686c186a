"""Which tokens of a completion count in the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from unisd.batch import counted_mask
from unisd.generation import end_token_ids

if TYPE_CHECKING:
    from unisd.trainer import UniSDTrainer


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
    count = math.ceil(share * entropies.numel())
    order = torch.sort(entropies, descending=True, stable=True).indices
    return order[:count].sort().values


def mask_rollout(trainer: UniSDTrainer, output: dict[str, Any]) -> None:
    """Take the tokens that do not count out of a rollout: its `loss_mask`, and its number of tokens; log how many."""
    args = trainer.args
    if not args.mask_truncated_completions and not args.skip_first_tokens:
        return
    ids, mask = output["completion_ids"], output["completion_mask"]
    end_ids = end_token_ids(trainer.accelerator.unwrap_model(trainer.model), trainer._tokenizer)
    before = counted_mask(output).sum()
    output["loss_mask"] = loss_mask(
        ids,
        mask,
        end_ids=end_ids,
        mask_truncated=args.mask_truncated_completions,
        skip_first=args.skip_first_tokens,
    )
    cut = truncated(ids, mask, end_ids).sum() if args.mask_truncated_completions else before.new_zeros(())
    counts = torch.stack([before - counted_mask(output).sum(), before, cut])
    removed, tokens, cut = trainer.accelerator.gather(counts.unsqueeze(0)).sum(0)
    output["num_items_in_batch"] = output["num_items_in_batch"] - removed
    metrics = trainer._metrics[trainer._mode]
    metrics["unisd/masked_share"].append((removed / tokens.clamp(min=1)).item())
    if args.mask_truncated_completions:
        metrics["unisd/masked_completions"].append(cut.item())
