"""Fused kernels for self-distillation: vocabulary-sized statistics and losses without vocabulary-sized memory.

Needs torch only. `linear_logprobs`, `linear_divergence` and `unisd_loss` go from hidden states and heads to per-token
statistics and losses; `agreement_weights` and `ema_update_` complete UniSD (arXiv 2605.06597). `mix_hidden` makes one
teacher of many. `reference` holds the dense definitions of all of it. `explain()` says which implementation runs here
and why.
"""

from unisd_kernels import reference
from unisd_kernels.backends.registry import available, explain
from unisd_kernels.config import LossConfig, LossInputs
from unisd_kernels.heads import LMHead
from unisd_kernels.ops.agreement import agreement_weights
from unisd_kernels.ops.divergence import linear_divergence
from unisd_kernels.ops.ema import ema_update_
from unisd_kernels.ops.logprobs import linear_logprobs
from unisd_kernels.ops.loss import unisd_loss
from unisd_kernels.ops.mixture import mix_hidden
from unisd_kernels.packing import pack_rows
from unisd_kernels.results import AgreementWeights, LinearLogProbs, UniSDLoss
from unisd_kernels.version import __version__

__all__ = [
    "AgreementWeights",
    "LMHead",
    "LinearLogProbs",
    "LossConfig",
    "LossInputs",
    "UniSDLoss",
    "__version__",
    "agreement_weights",
    "available",
    "ema_update_",
    "explain",
    "linear_divergence",
    "linear_logprobs",
    "mix_hidden",
    "pack_rows",
    "reference",
    "unisd_loss",
]
