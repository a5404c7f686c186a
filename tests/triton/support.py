"""The kernels run on a GPU where there is one, and under the interpreter elsewhere; bfloat16 only on the former,
because the interpreter's product of such operands is wrong."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.support import Problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NARROW = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])


def on_device(problem: Problem) -> Problem:
    """The same problem as fresh leaves on `DEVICE`."""

    def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.detach().to(DEVICE).requires_grad_(tensor.requires_grad)

    def head(source):
        return replace(source, weight=move(source.weight), bias=move(source.bias))

    return Problem(
        move(problem.student_hidden),
        head(problem.student_head),
        move(problem.teacher_hidden),
        head(problem.teacher_head),
        problem.target_ids.to(DEVICE),
        problem.cu_seqlens.to(DEVICE),
        [move(hidden) for hidden in problem.auxiliary_hidden],
        move(problem.negative_hidden),
        move(problem.token_weights),
    )
