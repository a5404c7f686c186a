"""Liger's `LigerFusedLinearJSDFunction` (liger_kernel.ops): row chunks, PyTorch products, a Triton divergence kernel.

It returns the mean of D over the rows and makes its gradients in the forward: per-token weights cannot reach them.
"""

from __future__ import annotations

import torch

from bench.cases import Case
from bench.peers.step import Outcome, Step, differentiate
from bench.records.failures import NotHere
from unisd_kernels.config import LossInputs


def build(case: Case, beta: float, device: torch.device) -> Step:
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    if device.type == "cpu":
        raise NotHere("its Triton kernel needs a GPU")
    # float32 sums over the chunks for dW, as ours; the default would add bfloat16 to bfloat16.
    sums = None if case.frozen_head else torch.float32

    def step(inputs: LossInputs) -> Outcome:
        weight = inputs.student_head.weight
        loss = LigerFusedLinearJSDFunction.apply(
            inputs.student_hidden,
            weight,
            inputs.teacher_hidden,
            weight,
            None,
            beta,
            -100,
            case.options["temperature"],
            sums,
        )
        return Outcome(loss.detach(), differentiate(loss, inputs))

    return step
