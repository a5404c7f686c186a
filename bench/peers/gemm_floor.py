"""The floor: the matrix products alone, at full size, into buffers that exist already."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.cases import Inputs


def build(inputs: Inputs, beta: float) -> Callable[[], tuple[None, None]]:
    case = inputs.case
    hidden, weight = inputs.student_hidden.detach(), inputs.head.weight.detach()
    logits = torch.empty(case.num_rows, case.vocab_size, dtype=case.dtype, device=hidden.device)
    gradient = torch.empty_like(hidden)

    def step() -> tuple[None, None]:
        for _ in range(case.num_auxiliary + 3):
            torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=gradient)
        if not case.frozen_head:
            torch.mm(logits.T, hidden)
        return None, None

    return step
