"""Completions without a token, which TRL's rollouts do not provide for: it asks every completion for its last token."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from accelerate import Accelerator


class EmptyCompletions:
    """Empty completions of one rollout. One token stands in for each, and is masked afterwards."""

    def __init__(self) -> None:
        self._empty: list[bool] | None = None  # None until the rollout has had its first turn

    def begin(self) -> None:
        """Forget the rollout before."""
        self._empty = None

    def filled(self, completion_ids: list[list[int]], stand_in: int) -> list[list[int]]:
        """The completions of the rollout's first turn with `stand_in` for each empty one; those of later turns (of a
        conversation with tools) as they are."""
        if self._empty is not None:
            return completion_ids
        self._empty = [len(ids) == 0 for ids in completion_ids]
        if any(self._empty):
            warnings.warn(
                f"the sampler returned {sum(self._empty)} empty completions of {len(completion_ids)}; they "
                "count as sequences with a loss of 0",
                stacklevel=3,
            )
        return [list(ids) or [stand_in] for ids in completion_ids]

    def take_out(self, output: dict[str, Any], accelerator: Accelerator) -> None:
        """Take the stand-ins out of the mask [B, T] of a rollout and out of its number of tokens; count its sequences,
        over all processes, as `num_sequences_in_batch`."""
        device, num_sequences = accelerator.device, len(output["completion_mask"])
        empty = torch.tensor(self._empty or [False] * num_sequences, device=device)
        output["completion_mask"] = output["completion_mask"].masked_fill(empty.unsqueeze(1), 0)
        counts = torch.stack([torch.tensor(num_sequences, device=device), empty.sum()])
        output["num_sequences_in_batch"], num_empty = accelerator.gather(counts.unsqueeze(0)).sum(0)
        output["num_items_in_batch"] = output["num_items_in_batch"] - num_empty
