"""Liger's `LigerFusedLinearKLDivFunction` (liger_kernel.ops): row chunks, PyTorch products, a Triton KL kernel.

It projects the student only. The teacher comes as a tensor of probabilities [N, V], so the step makes one: the product
in the dtype of the hidden states, then a compiled softmax, which writes float32 without float32 logits in memory.
bfloat16 probabilities would take half the memory, but round each by up to 0.4 %, and the gradient is p_s - p_t.

It returns the mean of KL(p_t || p_s) over the rows, without a factor of the temperature squared, and makes its
gradients in the forward: per-token weights cannot reach them. It has no other divergence.

It clamps the teacher's probabilities at 1e-10 inside the logarithm, which moves the value by a relative 1e-6 at these
cases' shapes and the gradient not at all. Changed default: `accum_dtype` is float32 for a trainable head.
"""

from __future__ import annotations

import torch

from bench.cases import Case
from bench.peers.step import Outcome, Step, differentiate
from bench.records.failures import NotHere, NotOffered
from unisd_kernels.config import LossInputs


def _probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.softmax(logits.float() / temperature, dim=-1)


def build(case: Case, beta: float, device: torch.device) -> Step:
    if beta != 0:
        raise NotOffered("LigerFusedLinearKLDivFunction has forward KL only")
    from liger_kernel.ops.fused_linear_kl_div import LigerFusedLinearKLDivFunction
    from triton import knobs

    if device.type == "cpu" and not knobs.runtime.interpret:
        raise NotHere("its Triton kernel needs a GPU")
    temperature = case.options["temperature"]
    # The interpreter is never timed.
    probabilities = _probabilities if device.type == "cpu" else torch.compile(_probabilities)
    # float32 sums over the chunks for dW, as ours; the default would add bfloat16 to bfloat16.
    sums = None if case.frozen_head else torch.float32

    def step(inputs: LossInputs) -> Outcome:
        weight = inputs.student_head.weight
        with torch.no_grad():
            target = probabilities(inputs.teacher_hidden @ weight.T, temperature)
        loss = LigerFusedLinearKLDivFunction.apply(
            inputs.student_hidden,
            weight,
            target,
            None,
            "batchmean",
            -100,
            temperature,
            1e-10,
            sums,
        )
        return Outcome(loss.detach(), differentiate(loss, inputs))

    return step
