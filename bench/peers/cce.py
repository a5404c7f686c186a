"""Apple's cut-cross-entropy for scoring: the negative log-probability of the target, logits never in memory."""

from __future__ import annotations

import torch

from bench.cases import Inputs
from bench.peers.step import Outcome, Step


def build(inputs: Inputs, beta: float) -> Step:
    if inputs.case.options["temperature"] != 1.0:
        raise ValueError("cut-cross-entropy has no temperature")
    from cut_cross_entropy import linear_cross_entropy

    hidden, weight = inputs.student_hidden.detach(), inputs.head.weight.detach()

    def step() -> Outcome:
        with torch.no_grad():
            return Outcome(-linear_cross_entropy(hidden, weight, inputs.target_ids, reduction="none").float(), None)

    return step
