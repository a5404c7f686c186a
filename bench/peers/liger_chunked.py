"""Liger's `LigerFusedLinearJSDLoss` (liger_kernel.chunked_loss): autograd inside row chunks, compiled.

It returns the mean of D over the rows, always makes a gradient of the head (one product more with a frozen one), and
takes its log-softmax in the dtype of the hidden states.
"""

from __future__ import annotations

from bench.cases import Inputs
from bench.peers.step import Outcome, Step, differentiate


def build(inputs: Inputs, beta: float) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    weight = inputs.head.weight
    # Its own default; a CPU only rehearses, and need not wait for a compiler.
    compiled = inputs.student_hidden.is_cuda
    loss_of = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=beta,
        temperature=inputs.case.options["temperature"],
        compiled=compiled,
    )

    def step() -> Outcome:
        loss = loss_of(inputs.student_hidden, weight, inputs.teacher_hidden, weight, inputs.target_ids)
        return Outcome(loss.detach(), differentiate(loss, inputs))

    return step
