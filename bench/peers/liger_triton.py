"""Liger's `LigerFusedLinearJSDFunction` (liger_kernel.ops): row chunks, PyTorch products, a Triton divergence kernel.

It returns the mean of D over the rows and makes its gradients in the forward: per-token weights cannot reach them.
"""

from __future__ import annotations

import torch

from bench.cases import Inputs
from bench.peers.step import Outcome, Step, differentiate


def build(inputs: Inputs, beta: float) -> Step:
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    weight, temperature = inputs.head.weight, inputs.case.options["temperature"]
    # float32 sums over the chunks for dW, as ours; the default would add bfloat16 to bfloat16.
    sums = None if inputs.case.frozen_head else torch.float32

    def step() -> Outcome:
        loss = LigerFusedLinearJSDFunction.apply(
            inputs.student_hidden, weight, inputs.teacher_hidden, weight, None, beta, -100, temperature, sums
        )
        return Outcome(loss.detach(), differentiate(loss, inputs))

    return step
