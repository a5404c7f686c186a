"""Liger's `LigerFusedLinearJSDLoss` (liger_kernel.chunked_loss): autograd inside row chunks, compiled.

It returns the mean of D over the rows, always makes a gradient of the head (one product more with a frozen one), and
takes its log-softmax in the dtype of the hidden states.
"""

from __future__ import annotations

import torch

from bench.cases import Case
from bench.peers.step import Outcome, Step, differentiate
from unisd_kernels.config import LossInputs


def build(case: Case, beta: float, device: torch.device) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss_of = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=beta,
        temperature=case.options["temperature"],
        # Its own default.
        compiled=True,
    )

    def step(inputs: LossInputs) -> Outcome:
        weight = inputs.student_head.weight
        loss = loss_of(inputs.student_hidden, weight, inputs.teacher_hidden, weight, inputs.target_ids)
        return Outcome(loss.detach(), differentiate(loss, inputs))

    return step
