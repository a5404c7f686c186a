"""Results of the operations: named tuples, so that they unpack, pass through `torch.compile` and pickle."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LinearLogProbs(NamedTuple):
    """Statistics of the next-token distribution of each row; float32 [N] (float64 for float64 inputs), in nats.

    Attributes:
        logprobs: `z_y - logsumexp(z)`, the log-probability of the row's target id.
        logsumexp: `logsumexp(z)`.
        entropy: `logsumexp(z) - sum_j p_j z_j`, or None when it was not asked for.
    """

    logprobs: torch.Tensor
    logsumexp: torch.Tensor
    entropy: torch.Tensor | None


class AgreementWeights(NamedTuple):
    """Weights of tokens, and the disagreement they come from.

    Attributes:
        weights: [N] float, one weight a token, no gradient.
        disagreement: the statistic the weights come from: [N] nats for token level, [B] for sequence level
            (nats squared when the statistic is the variance).
    """

    weights: torch.Tensor
    disagreement: torch.Tensor


class UniSDLoss(NamedTuple):
    """The result of `unisd_loss`. Only `loss` carries a gradient; the rest are detached statistics.

    With `return_statistics=False` a term of weight 0 is not computed: `divergence`, `clipped`, `weights` and what
    belongs to the agreement are None with `divergence_weight=0`, `negative_logprobs` and `contrastive` with
    `contrastive_weight=0`, and where neither term is computed the log-probabilities and entropies too.

    Scalars (float32, or float64 for float64 inputs):
        loss: the total.
        divergence_loss, contrastive_loss, feature_loss: its three parts before `divergence_weight`,
            `contrastive_weight` and `feature_weight` (zero where the mechanism is off or not computed).

    Per token, [N]:
        divergence: `D_n` before clipping, nats.
        clipped: bool, True where `D_n` was above the cap (all False without clipping).
        weights: the agreement weights times `token_weights` (ones without either).
        student_logprobs, teacher_logprobs: of the sampled token at the training temperature.
        student_entropy, teacher_entropy: nats, at the training temperature; None with `return_entropy=False`.
        negative_logprobs, contrastive: None without a negative context.
        feature_distance: `F_n`; None unless feature matching is on.

    Agreement (None without auxiliary contexts):
        auxiliary_logprobs: [K, N] at temperature 1.
        disagreement: [N] (token level) or [B] (sequence level).
    """

    loss: torch.Tensor
    divergence_loss: torch.Tensor
    contrastive_loss: torch.Tensor
    feature_loss: torch.Tensor
    divergence: torch.Tensor | None
    clipped: torch.Tensor | None
    weights: torch.Tensor | None
    student_logprobs: torch.Tensor | None
    teacher_logprobs: torch.Tensor | None
    student_entropy: torch.Tensor | None
    teacher_entropy: torch.Tensor | None
    negative_logprobs: torch.Tensor | None
    contrastive: torch.Tensor | None
    feature_distance: torch.Tensor | None
    auxiliary_logprobs: torch.Tensor | None
    disagreement: torch.Tensor | None
