"""Selective agreement: only the sequences the teacher is least sure of are read under the auxiliary contexts.

They are ranked over a whole generation window: the sequences of one optimizer step on one process, all of whose
micro-batches see the same weights. So the teacher's pass over the window can be made when its completions have been
generated, and its hidden states are kept for the loss: nothing is computed twice. A process ranks its own sequences, so
that every process does the same work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from unisd.batch import SCORED, TEACHER_HIDDEN, CompletionRows, per_sequence
from unisd_kernels import agreement_weights


def scored_count(fraction: float, size: int, window: int) -> int:
    """Number of a window's `size` sequences that are scored, such that their share over all windows is `fraction`.

        ceil(q B (t + 1)) - ceil(q B t)      for t = `window`, counted from 0

    differs from q B by less than one, and the sum over the first t windows from q B t by less than one. A window of one
    sequence is scored in a share q of the steps; a fixed rounding up would score all of them.
    """

    def until(end: int) -> int:
        return math.ceil(fraction * size * end - 1e-9)  # a rounding error in q B must not add a sequence

    return min(size, until(window + 1) - until(window))


def sequence_means(values: torch.Tensor, rows: CompletionRows, mask: torch.Tensor) -> torch.Tensor:
    """[B] means over the counted tokens of each sequence (0 for one without any) of `values` [N]."""
    mask = mask.to(values.device)
    per_position = values.new_zeros(mask.numel()).index_copy(0, rows.positions, values)
    return per_position.view_as(mask).sum(1) / mask.sum(1).clamp(min=1)


def most_uncertain(entropies: torch.Tensor, count: int) -> torch.Tensor:
    """[B] bool on the CPU: the `count` sequences of highest mean entropy."""
    chosen = torch.zeros(entropies.numel(), dtype=torch.bool)
    chosen[entropies.cpu().topk(count).indices] = True
    return chosen


@dataclass(frozen=True)
class SelectiveWeights:
    """Agreement weights of a micro-batch that were computed before its loss, of all or some of its sequences.

    Attributes:
        weights: [N], 1 for the tokens of the sequences that were not scored.
        disagreement: of the scored ones.
        num_scored: sequences that were read under the auxiliary contexts.
    """

    weights: torch.Tensor
    disagreement: torch.Tensor
    num_scored: int


def selective_weights(
    inputs: dict[str, Any],
    rows: CompletionRows,
    mask: torch.Tensor,
    scores: Callable[[dict[str, Any], CompletionRows], torch.Tensor],
    *,
    always_run: bool,
    **settings: Any,
) -> SelectiveWeights:
    """Agreement weights of a micro-batch in which `inputs[SCORED]` says which sequences are scored.

    Args:
        rows, mask: the N counted tokens and their [B, T] mask.
        scores: from a batch and its n counted tokens to their log-probabilities [K, n] under the auxiliary contexts at
            temperature 1, which is that of the agreement whatever the training temperature.
        always_run: score one sequence if none is to be scored: with sharded weights a pass is a
            collective, and another process may have sequences to score.
        settings: `level`, `statistic` and `gamma` of `agreement_weights`.
    """
    mask = mask.to(rows.ids.device)
    chosen = inputs[SCORED].nonzero().flatten()
    num_scored = chosen.numel()
    if num_scored == 0:
        if always_run:
            first = torch.zeros(1, dtype=torch.long)
            batch = _selected(inputs, first)
            scores(batch, CompletionRows.of(mask[first.to(mask.device)], batch["completion_ids"].to(mask.device)))
        ones = torch.ones(rows.ids.numel(), device=rows.ids.device)
        return SelectiveWeights(ones, ones[:0], 0)
    batch = _selected(inputs, chosen)
    chosen = chosen.to(mask.device)
    chosen_rows = CompletionRows.of(mask[chosen], batch["completion_ids"].to(mask.device))
    agreement = agreement_weights(scores(batch, chosen_rows), chosen_rows.cu_seqlens, **settings)
    weights = agreement.weights.new_ones(mask.shape)
    of_chosen = weights[chosen].flatten().index_copy(0, chosen_rows.positions, agreement.weights)
    weights[chosen] = of_chosen.view(num_scored, -1)
    return SelectiveWeights(weights.flatten().index_select(0, rows.positions), agreement.disagreement, num_scored)


def _selected(inputs: dict[str, Any], chosen: torch.Tensor) -> dict[str, Any]:
    """The sequences `chosen` [n] of a batch."""
    return {
        name: value[chosen.to(value.device)] for name, value in per_sequence(inputs).items() if name != TEACHER_HIDDEN
    }
