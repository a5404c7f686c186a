"""`agreement_weights`: per-token weights from how far several scorings of the same tokens agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from unisd_kernels.batch import Batch, check_groups
from unisd_kernels.config import check_choice, check_number
from unisd_kernels.ops.quantile import linear_quantile
from unisd_kernels.packing import sequence_ids, sequence_sums
from unisd_kernels.results import AgreementWeights
from unisd_kernels.validation import check_cu_seqlens, check_operand_dtype

if TYPE_CHECKING:  # a torch may be built without it
    from torch.distributed import ProcessGroup


@torch.no_grad()
def agreement_weights(
    logprobs: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    level: str = "token",
    statistic: str = "variance",
    gamma: float = 0.01,
    quantile: float = 0.95,
    row_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
) -> AgreementWeights:
    """Weight tokens by the agreement of K auxiliary scorings of the sampled token.

        token     d_n = Var_k(lp) (unbiased; 0 when K = 1) or max_k - min_k
                  w_n = max(1 / (1 + gamma min(d_n / max(quantile_0.95(d), 1e-6), 10)), 0.01)
        sequence  s_kb = mean of lp over the sequence's tokens;  d_b = Var_k(s) (biased) or max_k - min_k
                  w_b = max(exp(-gamma d_b), 1e-6), given to all its tokens

    Args:
        logprobs: [K, N] log-probabilities of the sampled tokens under K contexts, in nats, scored at temperature 1
            (`linear_logprobs`). K = 0 gives weights of one.
        cu_seqlens: [B + 1] offsets of the sequences.
        level: "token" or "sequence".
        statistic: "variance" or "range".
        gamma: >= 0; how strongly disagreement counts.
        quantile: of the token-level scale, over all N tokens of this call, or of `row_group`. In a
            gradient-accumulation loop that is the micro-batch; score the whole batch first if it must be the batch.
        row_group, sequence_group: ranks that hold other rows of the batch, or of its sequences; see `unisd_loss`. A
            token-level call then sends 24 bytes and its d_n, a sequence-level one the sums of lp in `sequence_group`.

    Returns:
        AgreementWeights(weights [N], disagreement [N] or [B]), float32 (float64 for float64 input), no gradient.
        Nothing is read back to the host without a group; with one, the number of rows of each rank.

    Raises:
        ValueError, TypeError: shapes or values that do not fit, saying what was got.

    Source: docs/design.md; UniSD, arXiv 2605.06597.
    """
    if not isinstance(logprobs, torch.Tensor):
        raise TypeError(f"logprobs must be a torch.Tensor [K, N], got {type(logprobs).__name__}; stack the K views")
    if logprobs.dim() != 2:
        raise ValueError(f"logprobs must have shape [K, N], got {tuple(logprobs.shape)}; stack the K views")
    check_operand_dtype("logprobs", logprobs)
    num_views, num_rows = logprobs.shape
    check_cu_seqlens(cu_seqlens, num_rows, logprobs.device)
    check_choice("level", level, ("token", "sequence"))
    check_choice("statistic", statistic, ("variance", "range"))
    check_number("gamma", gamma, low=0.0)
    check_number("quantile", quantile, low=0.0, high=1.0)
    check_groups(row_group, sequence_group)
    logprobs = logprobs if logprobs.dtype == torch.float64 else logprobs.float()
    call = ("agreement_weights", num_views, str(logprobs.dtype), level, statistic, gamma, quantile)
    batch = Batch.of(cu_seqlens, num_rows, row_group, sequence_group, call)
    return weights_in_batch(logprobs, cu_seqlens, batch, level, statistic, gamma, quantile)


def weights_in_batch(
    logprobs: torch.Tensor,
    cu_seqlens: torch.Tensor,
    batch: Batch,
    level: str,
    statistic: str,
    gamma: float,
    quantile: float = 0.95,
) -> AgreementWeights:
    """`agreement_weights` of checked rows [K, N], float32 or float64, of a batch."""
    num_views, num_rows = logprobs.shape
    num_sequences = cu_seqlens.numel() - 1
    if num_views == 0:
        size = num_rows if level == "token" else num_sequences
        return AgreementWeights(logprobs.new_ones(num_rows), logprobs.new_zeros(size))
    if level == "token":
        spread = _spread(logprobs, statistic, unbiased=True)
        if not batch.num_rows:
            return AgreementWeights(torch.ones_like(spread), spread)
        scale = token_scale(batch.gathered(spread), quantile)
        return AgreementWeights(token_weight(spread, scale, gamma), spread)
    means = batch.over_sequences(sequence_sums(logprobs, cu_seqlens)) / batch.lengths.clamp(min=1)
    spread = _spread(means, statistic, unbiased=False)
    weights = sequence_weight(spread, gamma)
    return AgreementWeights(weights[sequence_ids(cu_seqlens, num_rows)], spread)


def token_scale(spread: torch.Tensor, quantile: float = 0.95) -> torch.Tensor:
    """What the disagreement [N] of at least one token is measured by."""
    return linear_quantile(spread, quantile).clamp(min=1e-6)


def token_weight(spread: torch.Tensor, scale: torch.Tensor, gamma: float) -> torch.Tensor:
    """Weights of tokens from their disagreement."""
    return (1.0 / (1.0 + gamma * (spread / scale).clamp(max=10.0))).clamp(min=0.01)


def sequence_weight(spread: torch.Tensor, gamma: float) -> torch.Tensor:
    """Weights of sequences from their disagreement."""
    return torch.exp(-gamma * spread).clamp(min=1e-6)


def _spread(scores: torch.Tensor, statistic: str, unbiased: bool) -> torch.Tensor:
    """Variance (0 for K = 1) or range over the views of [K, M] scores, [M]."""
    if statistic == "range":
        return scores.amax(0) - scores.amin(0)
    num_views = scores.shape[0]
    if num_views == 1:
        return torch.zeros_like(scores[0])
    # In two steps, so that an empty batch is no special case (`var` warns about one).
    deviations = scores - scores.mean(dim=0)
    return deviations.square().sum(dim=0) / (num_views - unbiased)
