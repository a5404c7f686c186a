"""Agreement weights that the loss is given, and selective agreement: only the sequences the teacher is least sure of
are read under the auxiliary contexts.

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

from unisd.batch import AGREEMENT_WEIGHTS, DISAGREEMENT, SCORED, TEACHER_HIDDEN, CompletionRows, per_sequence
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
class GivenWeights:
    """Agreement weights of a micro-batch that the loss is given.

    Attributes:
        weights: [N], 1 for the tokens of the sequences that were not scored.
        disagreement: of the scored ones.
        num_scored: sequences that were read under the auxiliary contexts.
    """

    weights: torch.Tensor
    disagreement: torch.Tensor
    num_scored: int


def selected_scores(
    inputs: dict[str, Any],
    mask: torch.Tensor,
    scores: Callable[[dict[str, Any], CompletionRows], torch.Tensor],
    *,
    num_views: int,
    dtype: torch.dtype,
    always_run: bool,
) -> tuple[torch.Tensor, CompletionRows]:
    """Scores [K, n] of the n counted tokens of the sequences that `inputs[SCORED]` chooses, and those tokens.

    Args:
        mask: [B, T] of the counted tokens, where the loss is computed.
        scores: from a batch and its n counted tokens to their log-probabilities [K, n] under the auxiliary contexts at
            temperature 1, which is that of the agreement whatever the training temperature.
        num_views: K.
        dtype: of the log-probabilities.
        always_run: score one sequence if none is to be scored: with sharded weights a pass is a collective, and
            another process may have sequences to score.
    """
    chosen = inputs[SCORED].nonzero().flatten()
    is_idle = chosen.numel() == 0
    if is_idle and always_run:
        chosen = torch.zeros(1, dtype=torch.long)
    batch = _selected(inputs, chosen)
    rows = CompletionRows.of(mask[chosen.to(mask.device)], batch["completion_ids"].to(mask.device))
    found = scores(batch, rows) if chosen.numel() else None
    if found is None or is_idle:
        none = CompletionRows.of(mask[:0], inputs["completion_ids"][:0].to(mask.device))
        return torch.zeros(num_views, 0, dtype=dtype, device=mask.device), none
    return found, rows


def selective_weights(
    inputs: dict[str, Any],
    rows: CompletionRows,
    mask: torch.Tensor,
    scores: torch.Tensor,
    scored_rows: CompletionRows,
    **settings: Any,
) -> GivenWeights:
    """Agreement weights of a micro-batch in which `inputs[SCORED]` says which sequences are scored.

    Args:
        rows, mask: the N counted tokens and their [B, T] mask.
        scores, scored_rows: of `selected_scores`.
        settings: `level`, `statistic` and `gamma` of `agreement_weights`.
    """
    scored = scored_sequences(inputs, mask)
    found = agreement_weights(scores, scored_rows.cu_seqlens, **settings)
    weights = found.weights.new_ones(rows.ids.numel())
    weights[scored[rows.positions // mask.shape[1]]] = found.weights
    return GivenWeights(weights, found.disagreement, int(inputs[SCORED].sum()))


def weights_of_window(inputs: dict[str, Any], rows: CompletionRows, mask: torch.Tensor, level: str) -> GivenWeights:
    """Agreement weights of a micro-batch that were made over its window (`unisd.window`), as `selective_weights`."""
    scored = scored_sequences(inputs, mask)
    weights, spread = (inputs[name].to(mask.device) for name in (AGREEMENT_WEIGHTS, DISAGREEMENT))
    if level == "sequence":
        disagreement = spread[scored, 0]
    else:
        of_tokens = spread.flatten().index_select(0, rows.positions)
        disagreement = of_tokens[scored[rows.positions // mask.shape[1]]]
    num_scored = int(inputs[SCORED].sum()) if SCORED in inputs else len(scored)
    return GivenWeights(weights.flatten().index_select(0, rows.positions), disagreement, num_scored)


def scored_sequences(inputs: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
    """[B] bool, where `mask` [B, T] is: which sequences are read under the auxiliary contexts."""
    if SCORED in inputs:
        return inputs[SCORED].to(mask.device)
    return torch.ones(mask.shape[0], dtype=torch.bool, device=mask.device)


def _selected(inputs: dict[str, Any], chosen: torch.Tensor) -> dict[str, Any]:
    """The sequences `chosen` [n] of a batch."""
    return {
        name: value[chosen.to(value.device)] for name, value in per_sequence(inputs).items() if name != TEACHER_HIDDEN
    }
