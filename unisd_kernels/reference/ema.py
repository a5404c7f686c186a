"""Exponential moving average of weights, in the arithmetic of the tensors given (float64 included)."""

from __future__ import annotations

from collections.abc import Iterable

import torch


@torch.no_grad()
def ema_update_(teacher: Iterable[torch.Tensor], student: Iterable[torch.Tensor], decay: float) -> None:
    """`theta_t = decay * theta_t + (1 - decay) * theta_s`, in place, in the teacher's own dtype.

    In bfloat16 this is the stalling form of the public implementations: an increment below half an ulp is lost.
    `unisd_kernels.ema_update_` refuses it; here it stays the plain definition.
    """
    for target, source in zip(teacher, student, strict=True):
        target.copy_(decay * target + (1.0 - decay) * source.to(target.dtype))
