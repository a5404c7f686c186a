"""Apple's cut-cross-entropy for scoring: the negative log-probability of the target, logits never in memory.

On an accelerator its Triton kernels, on a CPU the compiled implementation that it offers for machines without them.
"""

from __future__ import annotations

import torch

from bench.cases import Case
from bench.peers.step import Outcome, Step
from bench.records.failures import NotOffered
from unisd_kernels.config import LossInputs


def build(case: Case, beta: float, device: torch.device) -> Step:
    if case.options["temperature"] != 1.0:
        raise NotOffered("cut-cross-entropy has no temperature")
    from cut_cross_entropy import linear_cross_entropy

    impl = "torch_compile" if device.type == "cpu" else "cce"

    def step(inputs: LossInputs) -> Outcome:
        hidden, weight = inputs.student_hidden.detach(), inputs.student_head.weight.detach()
        with torch.no_grad():
            loss = linear_cross_entropy(hidden, weight, inputs.target_ids, reduction="none", impl=impl)
            return Outcome(-loss.float(), None)

    return step
