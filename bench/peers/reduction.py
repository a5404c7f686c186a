"""Reduction of per-token statistics to the UniSD* loss, for peers that offer only the statistics."""

from __future__ import annotations

import torch

from bench.cases import Case
from unisd_kernels.config import LossInputs
from unisd_kernels.reference import agreement_weights, contrastive_hinge, feature_distance
from unisd_kernels.reference.loss import reduce_per_token


def combine(
    case: Case,
    inputs: LossInputs,
    divergence: torch.Tensor,
    student_logprobs: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    negative_logprobs: torch.Tensor,
    auxiliary_logprobs: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Statistics [N], `auxiliary_logprobs` [K, N]; `weights` [N] stand in for those of agreement."""
    options, cu_seqlens = case.options, inputs.cu_seqlens
    if weights is None and len(auxiliary_logprobs) == 0:
        weights = torch.ones_like(divergence)
    elif weights is None:
        weights = agreement_weights(auxiliary_logprobs, cu_seqlens, gamma=options["agreement_gamma"]).weights
    hinge = contrastive_hinge(student_logprobs, teacher_logprobs, negative_logprobs, options["contrastive_margin"])
    features = feature_distance(inputs.student_hidden, inputs.teacher_hidden)
    return (
        reduce_per_token(divergence, cu_seqlens, "sequence", weights, "weighted")
        + options["contrastive_weight"] * reduce_per_token(hinge, cu_seqlens, "sequence")
        + options["feature_weight"] * reduce_per_token(features, cu_seqlens, "sequence")
    )
