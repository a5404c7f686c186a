"""Logits that are stored less the references of their block of columns (`fused_divergence.py`), read back."""

from __future__ import annotations

import triton
import triton.language as tl

from unisd_kernels.backends.triton.statistics import (
    MOMENT,
    RECORD,
    SHIFT,
    STUDENT_MAX,
    TEACHER_MAX,
    TEACHER_SUM,
    is_far,
)

# float16's largest number, less a margin; what is beyond it has no probability.
LARGEST = tl.constexpr(60000.0)


@triton.jit
def block_references(
    partials,  # statistics.Partials.values
    place,  # row times number of blocks plus block
    mask,
):
    """max z_s, the mean of delta, max z_t and `is_far` of blocks."""
    reference = partials + place * RECORD
    highest = tl.load(reference + STUDENT_MAX, mask=mask, other=0.0)
    shift = tl.load(reference + SHIFT, mask=mask, other=0.0)
    teacher_highest = tl.load(reference + TEACHER_MAX, mask=mask, other=0.0)
    moment = tl.load(reference + MOMENT, mask=mask, other=0.0)
    teacher_sum = tl.load(reference + TEACHER_SUM, mask=mask, other=1.0)
    return highest, shift, teacher_highest, is_far(highest, shift, teacher_highest, teacher_sum, moment)


@triton.jit
def student_base(z, highest, tanh_scale):
    """What stored student logits are relative to: their block's maximum or, under a soft cap and above 0, minus it."""
    base = highest
    if tanh_scale is not None:
        base = tl.where(z > 0.0, -tanh_scale, base)
    return base


@triton.jit
def differences(
    logprob,  # log p_s
    other,  # what is stored of the teacher
    shift,
    teacher_highest,
    far,
    difference,  # logsumexp(z_t) - logsumexp(z_s) of the row
    teacher_logsumexp,
):
    """d = log p_t - log p_s, and log p_t. `other` is relative to the teacher's maximum where the teacher is far, else
    to the mean of delta."""
    far_logprob = other + (teacher_highest - teacher_logsumexp)
    d = tl.where(far, far_logprob - logprob, other + (shift - difference))
    return d, tl.where(far, far_logprob, logprob + d)
