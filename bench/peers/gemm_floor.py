"""The floor: the matrix products alone, at full size, into buffers that exist already."""

from __future__ import annotations

import torch

from bench.cases import Inputs
from bench.peers.step import Outcome, Step

# Above this size of the logits, the rows go in chunks.
LARGEST_BUFFER = 4 << 30
CHUNK_ROWS = 8192


def build(inputs: Inputs, beta: float) -> Step:
    case = inputs.case
    hidden, weight = inputs.student_hidden.detach(), inputs.head.weight.detach()
    rows = case.num_rows
    if rows * case.vocab_size * case.dtype.itemsize > LARGEST_BUFFER:
        rows = min(rows, CHUNK_ROWS)
    logits = torch.empty(rows, case.vocab_size, dtype=case.dtype, device=hidden.device)
    gradient = None if case.operation == "scoring" else torch.empty_like(hidden)
    weight_gradient = None if case.frozen_head else torch.empty_like(weight)

    def step() -> Outcome:
        for start in range(0, case.num_rows, rows):
            part = hidden[start : start + rows]
            tile = logits[: part.shape[0]]
            for _ in range(case.num_forward_products):
                torch.mm(part, weight.T, out=tile)
            if gradient is not None:
                torch.mm(tile, weight, out=gradient[start : start + rows])
            if weight_gradient is not None:
                torch.mm(tile.T, part, out=weight_gradient)
        return Outcome(None, None)

    return step
