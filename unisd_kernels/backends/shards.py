"""Statistics of rows over the slices of a vocabulary, and those of the whole vocabulary from them.

Each rank takes the statistics of its columns as if these were all: log-sum-exps l_r, conditional probabilities, and
with them D_r, H_r and the target's log-probability, where it has the target. With M the largest l_r, e_r = e^(l_r - M)
and S = sum_r e_r, the rank's columns have the share e_r / S of the probability, and by the chain rule

    logsumexp = M + log S,    logp(y) = z_y - logsumexp,    entropy = log S + sum_r e_r (H_r - (l_r - M)) / S
    KL(p_t || p_s) = sum_r e_t,r (D_r + (l_t,r - M_t) - (l_s,r - M_s)) / S_t - log S_t + log S_s

and with s and t exchanged for KL(p_s || p_t). So one message has the maxima, one the sums. The mixture of a
Jensen-Shannon divergence is not of one shard: the sums of its terms come after these two, in a third message.

What is exchanged is float64, whatever the operands: logarithms of sums cancel above, and where shares and log-sum-exps
are consistent, the rounding of a float32 log-sum-exp enters a divergence in second order only. All ranks compute with
what a message brought, which has the same bits on all, and so come to the same decisions.

Source: Megatron-LM's vocabulary-parallel cross-entropy for the conventions (arXiv 1909.08053).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from unisd_kernels.backends.base import DivergenceRows, Scores, ShardDivergence, ShardRows, WholeRows
from unisd_kernels.backends.projection import Projection
from unisd_kernels.heads.shard import VocabShard

# Writes the gradient of given weights on the divergence and on the student's log-probability, [rows] or None each.
Backward = Callable[[torch.Tensor | None, torch.Tensor | None], None]


class _Shares:
    """Shares of the ranks in several sums of exponentials: `[views, rows]`, from this rank's log-sum-exps."""

    def __init__(self, shard: VocabShard, logsumexps: torch.Tensor) -> None:
        # A maximum may lose a NaN, or make one of all; the sums do not.
        highest = torch.where(logsumexps.isnan(), -torch.inf, logsumexps)
        shard.all_reduce(highest, maximum=True)
        self.highest = torch.where(highest.isfinite(), highest, 0.0)
        self._empty = shard.num_columns == 0
        self.above = torch.zeros_like(highest) if self._empty else logsumexps - self.highest
        self.parts = torch.zeros_like(highest) if self._empty else self.above.exp()

    def weigh(self, view: int, values: torch.Tensor) -> torch.Tensor:
        """`e_r` of a view times values; a slice without a column has nothing to add."""
        return torch.zeros_like(values) if self._empty else self.parts[view] * values


def whole_scores(shard: VocabShard, parts: list[Scores], local_ids: list[torch.Tensor]) -> list[Scores]:
    """Scores of several views over the whole vocabulary from those over this rank's columns, in two messages for all.

    `local_ids`: of each view, [rows]; -1 where another rank has the target.
    """
    rows = [part.logsumexp.shape[0] for part in parts]
    logsumexps = torch.cat([part.logsumexp for part in parts]).double().unsqueeze(0)
    dtype, want_entropy = parts[0].logsumexp.dtype, parts[0].entropy is not None
    if not logsumexps.numel():
        return parts
    shares = _Shares(shard, logsumexps)
    owned = torch.cat(local_ids) >= 0
    targets = torch.cat([part.logprobs for part in parts]).double() + logsumexps[0]
    sums = [shares.parts[0], torch.where(owned, targets, 0.0)]
    if want_entropy:
        entropies = torch.cat([part.entropy for part in parts if part.entropy is not None])
        sums.append(shares.weigh(0, entropies.double() - shares.above[0]))
    message = torch.stack(sums)
    shard.all_reduce(message)
    total, target, *spread = message
    logsumexp = shares.highest[0] + total.log()
    entropy = (total.log() + spread[0] / total).to(dtype).split(rows) if want_entropy else [None] * len(parts)
    return [
        Scores(*each)
        for each in zip(
            (target - logsumexp).to(dtype).split(rows), logsumexp.to(dtype).split(rows), entropy, strict=True
        )
    ]


def whole_pair(
    shard: VocabShard, part: ShardRows, local_ids: torch.Tensor | None, beta: float, dtype: torch.dtype
) -> WholeRows:
    """Statistics of student and teacher over the whole vocabulary from those over this rank's columns, in two messages.
    Of a mixture the divergence is not among them yet."""
    shares = _Shares(shard, torch.stack([part.student_logsumexp, part.teacher_logsumexp]))
    sums = [*shares.parts]
    if part.divergence is not None:
        # The one under which the expectation of a KL is taken comes first.
        first, second = (1, 0) if beta == 0.0 else (0, 1)
        sums.append(shares.weigh(first, part.divergence.double() + shares.above[first] - shares.above[second]))
    logprobs = (part.student_logprobs, part.teacher_logprobs)
    if local_ids is not None:
        for value, logsumexp in zip(logprobs, part[:2], strict=True):
            assert value is not None
            assert logsumexp is not None
            sums.append(torch.where(local_ids >= 0, value.double() + logsumexp, 0.0))
    entropies = (part.student_entropy, part.teacher_entropy)
    for view, value in enumerate(entropies):
        if value is not None:
            sums.append(shares.weigh(view, value.double() - shares.above[view]))
    message = torch.stack(sums)
    shard.all_reduce(message)
    found = iter(message)
    totals = torch.stack([next(found), next(found)])
    logs = totals.log()
    logsumexp = shares.highest + logs
    divergence = torch.zeros_like(logs[0])
    if part.divergence is not None:
        divergence = (next(found) / totals[first] - logs[first] + logs[second]).clamp(min=0.0)
    results: list[torch.Tensor | None] = [divergence.to(dtype)]
    for view, value in enumerate(logprobs):
        results.append(None if local_ids is None or value is None else (next(found) - logsumexp[view]).to(dtype))
    for view, value in enumerate(entropies):
        results.append(None if value is None else (logs[view] + next(found) / totals[view]).to(dtype))
    return WholeRows(DivergenceRows(*results), logsumexp[0], logsumexp[1], None)  # type: ignore[arg-type]


def with_mixture(shard: VocabShard, whole: WholeRows, sums: torch.Tensor) -> WholeRows:
    """With the divergence of a mixture and KL(p_s || m), from this rank's [2, rows] sums of their terms: a message."""
    message, dtype = sums.double(), whole.rows.divergence.dtype
    shard.all_reduce(message)
    divergence, student_kl = message.to(dtype)
    return whole._replace(rows=whole.rows._replace(divergence=divergence.clamp(min=0.0)), student_kl=student_kl)


def shard_forward(
    student: Projection,
    pair: ShardDivergence,
    beta: float,
    chunk: Any,
    rows: slice,
    local: slice,
    target_ids: torch.Tensor | None,
    want_entropy: bool,
) -> tuple[DivergenceRows, Backward]:
    """`Divergence.forward` where a slice of the vocabulary is here: the statistics of the whole rows, by messages to
    the ranks that have the other slices; and what writes the gradient for the columns that are here."""
    shard, mixture = student.shard, 0.0 < beta < 1.0
    assert shard is not None
    local_ids = None if target_ids is None else shard.local_ids(target_ids)
    if not student.num_columns:
        count, device = rows.stop - rows.start, student.hidden.device
        part = ShardRows.nothing(count, device, mixture, target_ids is not None, want_entropy)
        whole = whole_pair(shard, part, local_ids, beta, student.dtype)
        if mixture:
            whole = with_mixture(shard, whole, torch.zeros(2, count, dtype=torch.float64, device=device))
        return whole.rows, lambda weight, logprob_weight: None
    part, saved = pair.shard_forward(chunk, rows, local, local_ids, want_entropy)
    whole = whole_pair(shard, part, local_ids, beta, student.dtype)
    if mixture:
        whole = with_mixture(shard, whole, pair.shard_mixture(saved, whole))
    return whole.rows, functools.partial(pair.shard_backward, saved, whole, local_ids)
