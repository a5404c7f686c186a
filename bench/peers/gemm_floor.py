"""The floor: the matrix products alone, at full size, into buffers that exist already; of 16-bit operands also those of
as many float32 ones."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from bench.cases import Case
from bench.inputs.sets import make_inputs
from bench.peers.step import Outcome, Step
from unisd_kernels.config import LossInputs

# Above this size of the logits, the rows go in chunks.
LARGEST_BUFFER = 4 << 30
CHUNK_ROWS = 8192


def build_float32(case: Case, beta: float, device: torch.device) -> Step:
    """The floor in float32, on tensors of its own; numbers do not change its time."""
    case = replace(case, dtype=torch.float32)
    own = itertools.cycle([make_inputs(case, device, seed) for seed in range(2)])
    step = build(case, beta, device)
    return lambda inputs: step(next(own))


def build(case: Case, beta: float, device: torch.device) -> Step:
    rows = case.num_rows
    if rows * case.vocab_size * case.dtype.itemsize > LARGEST_BUFFER:
        rows = min(rows, CHUNK_ROWS)

    def buffer(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=case.dtype, device=device)

    logits = buffer(rows, case.vocab_size)
    gradient = None if case.operation == "scoring" else buffer(case.num_rows, case.hidden_size)
    weight_gradient = None if case.frozen_head else buffer(case.vocab_size, case.hidden_size)

    def step(inputs: LossInputs) -> Outcome:
        hidden, weight = inputs.student_hidden.detach(), inputs.student_head.weight.detach()
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
