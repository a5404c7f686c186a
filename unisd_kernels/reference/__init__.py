"""Dense, readable definitions of everything the package computes. The only oracle: every fast path is tested here.

Plain PyTorch, differentiated by autograd, computed in float32 or, for float64 inputs, in float64. These functions hold
several [N, V] tensors; they define the numbers, they are not for training large models.
"""

from unisd_kernels.reference.agreement import agreement_weights
from unisd_kernels.reference.clipping import clip_cap_from_quantile, clip_divergence
from unisd_kernels.reference.contrastive import contrastive_hinge
from unisd_kernels.reference.divergence import divergence_from_log_probs, linear_divergence
from unisd_kernels.reference.ema import ema_update_
from unisd_kernels.reference.features import feature_distance
from unisd_kernels.reference.logprobs import linear_logits, linear_logprobs
from unisd_kernels.reference.loss import unisd_loss
from unisd_kernels.reference.mixture import mixture_log_probs

__all__ = [
    "agreement_weights",
    "clip_cap_from_quantile",
    "clip_divergence",
    "contrastive_hinge",
    "divergence_from_log_probs",
    "ema_update_",
    "feature_distance",
    "linear_divergence",
    "linear_logits",
    "linear_logprobs",
    "mixture_log_probs",
    "unisd_loss",
]
