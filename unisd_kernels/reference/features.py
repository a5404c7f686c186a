"""Feature matching on the hidden state that enters the head."""

from __future__ import annotations

import torch

from unisd_kernels.dtypes import statistics_dtype


def feature_distance(student_hidden: torch.Tensor, teacher_hidden: torch.Tensor) -> torch.Tensor:
    """`F_n = mean_h (h_s - h_t)^2`, [N]; gradient to the student only."""
    dtype = statistics_dtype(student_hidden.dtype)
    return (student_hidden.to(dtype) - teacher_hidden.detach().to(dtype)).square().mean(-1)
