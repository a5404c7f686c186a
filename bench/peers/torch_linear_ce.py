"""PyTorch's own `linear_cross_entropy` (torch.nn.functional, from 2.13) for scoring, in chunks of its choice."""

from __future__ import annotations

import torch

from bench.cases import Case
from bench.peers.step import Outcome, Step
from bench.records.failures import NotHere, NotOffered
from unisd_kernels.config import LossInputs


def build(case: Case, beta: float, device: torch.device) -> Step:
    if case.options["temperature"] != 1.0:
        raise NotOffered("torch's linear_cross_entropy has no temperature")
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        raise NotHere(f"it needs torch 2.13 or newer, this is {torch.__version__}")
    options = torch.nn.LinearCrossEntropyOptions()

    def step(inputs: LossInputs) -> Outcome:
        hidden, weight = inputs.student_hidden.detach(), inputs.student_head.weight.detach()
        with torch.no_grad():
            loss = torch.nn.functional.linear_cross_entropy(
                hidden, weight, inputs.target_ids, reduction="none", options=options
            )
            return Outcome(-loss.float(), None)

    return step
