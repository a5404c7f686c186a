"""The UniSD objective of docs/design.md, term by term, sequence by sequence."""

from __future__ import annotations

from itertools import pairwise

import torch

from unisd_kernels.config import LossConfig, LossInputs
from unisd_kernels.dtypes import statistics_dtype
from unisd_kernels.reference.agreement import agreement_weights
from unisd_kernels.reference.clipping import clip_cap_from_quantile, clip_divergence
from unisd_kernels.reference.contrastive import contrastive_hinge
from unisd_kernels.reference.divergence import linear_divergence
from unisd_kernels.reference.features import feature_distance
from unisd_kernels.reference.logprobs import linear_logprobs
from unisd_kernels.results import UniSDLoss


def reduce_per_token(
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    normalization: str,
    weights: torch.Tensor | None = None,
    weight_normalization: str = "count",
) -> torch.Tensor:
    """Weighted per-token values [N] to a scalar.

    Per group of tokens (one sequence, or with `normalization="token"` the whole batch):
    `sum(values * weights) / denominator`, where the denominator is `max(sum(weights), 1)` ("weighted") or
    `max(number of tokens, 1)` ("count"); then the mean over the groups. An empty sequence contributes 0 to that mean.
    """
    if weights is None:
        weights = torch.ones_like(values)
    bounds = cu_seqlens.tolist() if normalization == "sequence" else [0, values.shape[0]]
    groups = []
    for start, end in pairwise(bounds):
        group_weights = weights[start:end]
        total = group_weights.sum() if weight_normalization == "weighted" else group_weights.new_tensor(end - start)
        groups.append((values[start:end] * group_weights).sum() / total.clamp(min=1.0))
    return torch.stack(groups).mean() if groups else values.sum()


def unisd_loss(inputs: LossInputs, config: LossConfig) -> UniSDLoss:
    """Dense UniSD loss: `unisd_kernels.unisd_loss` with its tensors and its settings as two values; the same result."""
    dtype = statistics_dtype(inputs.student_hidden.dtype)
    zero = torch.zeros((), dtype=dtype, device=inputs.student_hidden.device)
    has_divergence, has_contrast = config.runs_divergence, config.runs_contrast(inputs.negative_hidden is not None)

    share = inputs.share(config.normalization, dtype)
    student = teacher = None
    if has_divergence or has_contrast:
        student = linear_logprobs(
            inputs.student_hidden, inputs.student_head, inputs.target_ids, config.temperature, config.return_entropy
        )
        with torch.no_grad():
            teacher = linear_logprobs(
                inputs.teacher_hidden, inputs.teacher_head, inputs.target_ids, config.temperature, config.return_entropy
            )

    divergence = clipped = weights = auxiliary = spread = None
    divergence_loss = zero
    if has_divergence:
        divergence = linear_divergence(
            inputs.student_hidden,
            inputs.student_head,
            inputs.teacher_hidden,
            inputs.teacher_head,
            config.beta,
            config.temperature,
        )
        kept, clipped = _clip(divergence, config)
        weights, auxiliary, spread = _token_weights(inputs, config)
        normalization = config.resolved_weight_normalization(auxiliary is not None)
        if inputs.weight_total is None:
            divergence_loss = share * reduce_per_token(
                kept, inputs.cu_seqlens, config.normalization, weights, normalization
            )
        else:
            divergence_loss = (kept * weights).sum() / inputs.weight_total

    negative = contrastive = None
    contrastive_loss = zero
    if has_contrast:
        assert inputs.negative_hidden is not None
        assert student is not None
        assert teacher is not None
        with torch.no_grad():
            head = inputs.teacher_head if inputs.negative_head is None else inputs.negative_head
            negative = linear_logprobs(inputs.negative_hidden, head, inputs.target_ids, config.temperature).logprobs
        contrastive = contrastive_hinge(student.logprobs, teacher.logprobs, negative, config.contrastive_margin)
        contrastive_loss = share * reduce_per_token(contrastive, inputs.cu_seqlens, config.normalization)

    features = None
    feature_loss = zero
    if config.feature_weight > 0:
        features = feature_distance(inputs.student_hidden, inputs.teacher_hidden)
        feature_loss = share * reduce_per_token(features, inputs.cu_seqlens, config.normalization)

    loss = (
        config.divergence_weight * divergence_loss
        + config.contrastive_weight * contrastive_loss
        + config.feature_weight * feature_loss
    )
    return UniSDLoss(
        loss=loss,
        divergence_loss=divergence_loss.detach(),
        contrastive_loss=contrastive_loss.detach(),
        feature_loss=feature_loss.detach(),
        divergence=_detach(divergence),
        clipped=clipped,
        weights=weights,
        student_logprobs=None if student is None else student.logprobs.detach(),
        teacher_logprobs=None if teacher is None else teacher.logprobs,
        student_entropy=None if student is None else _detach(student.entropy),
        teacher_entropy=None if teacher is None else teacher.entropy,
        negative_logprobs=negative,
        contrastive=_detach(contrastive),
        feature_distance=_detach(features),
        auxiliary_logprobs=auxiliary,
        disagreement=spread,
    )


def _clip(divergence: torch.Tensor, config: LossConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """D after clipping, and which of them were above the cap (bool [N])."""
    if divergence.numel() == 0 or (config.clip_cap is None and config.clip_quantile is None):
        return divergence, torch.zeros_like(divergence, dtype=torch.bool)
    if config.clip_quantile is not None:
        cap: float | torch.Tensor = clip_cap_from_quantile(divergence, config.clip_quantile)
    else:
        cap = float(config.clip_cap)  # type: ignore[arg-type]
    return clip_divergence(divergence, cap), divergence.detach() > cap


@torch.no_grad()
def _token_weights(
    inputs: LossInputs, config: LossConfig
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Agreement weights times `token_weights` [N], the scores they come from [K, N], and their disagreement."""
    dtype = statistics_dtype(inputs.student_hidden.dtype)
    weights = torch.ones(inputs.num_rows, dtype=dtype, device=inputs.student_hidden.device)
    auxiliary = spread = None
    if inputs.auxiliary_hidden:
        head = inputs.teacher_head if inputs.auxiliary_head is None else inputs.auxiliary_head
        # Agreement is always scored at temperature 1, whatever the training temperature.
        auxiliary = torch.stack(
            [linear_logprobs(hidden, head, inputs.target_ids).logprobs for hidden in inputs.auxiliary_hidden]
        )
        weights, spread = agreement_weights(
            auxiliary,
            inputs.cu_seqlens,
            level=config.agreement,
            statistic=config.agreement_statistic,
            gamma=config.agreement_gamma,
        )
    if inputs.token_weights is not None:
        weights = weights * inputs.token_weights.to(dtype)
    return weights, auxiliary, spread


def _detach(values: torch.Tensor | None) -> torch.Tensor | None:
    return None if values is None else values.detach()
