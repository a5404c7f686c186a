"""ORDA's `distillation_loss` with its tied teacher (orda_kernel): row chunks, one product for student and teacher, a
Triton kernel that writes the gradient of the logits in place. On a CPU its PyTorch backend, all logits at once.

It returns the mean of D over the rows and makes its gradients in the forward: per-token weights cannot reach them. The
teacher is frozen, also under a trainable head, whose gradient is the student's alone. Clipping and auxiliary views it
does not have.

It has every divergence of this package: "forward", "reverse", and "skew_js", whose `kl_beta` is the weight of the
student in the mixture, hence 1 - beta. Its KL is multiplied by the temperature squared, which `kl_weight` undoes:
for the gradient inside the kernel, for the value by a scalar product.

Changed defaults: no cross-entropy of student or teacher; the profile "fast", which its source calls the
throughput-oriented one: chunks of about 1024 rows, the launch tuned in the first call; float32 sums for dW;
labels not checked, which would wait for the GPU.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.cases import Case
from bench.peers.step import Outcome, Step, differentiate
from unisd_kernels.config import LossInputs


def _divergence(beta: float) -> dict[str, Any]:
    if beta in (0, 1):
        return {"kl_divergence": "reverse" if beta else "forward"}
    return {"kl_divergence": "skew_js", "kl_beta": 1 - beta}


def build(case: Case, beta: float, device: torch.device) -> Step:
    from orda_kernel import KernelConfig, TiedTeacher, distillation_loss

    temperature = case.options["temperature"]
    options: dict[str, Any] = {
        **_divergence(beta),
        "student_ce_weight": 0.0,
        "teacher_ce_weight": 0.0,
        "kl_weight": temperature**-2,
        "kl_temperature": temperature,
        "profile": "fast",
        # By name, so that a fallback is an error and not a slow row.
        "backend": "torch" if device.type == "cpu" else "triton",
        "config": KernelConfig(grad_weight_accumulation="fp32", assume_valid_labels=True),
    }

    def step(inputs: LossInputs) -> Outcome:
        teacher = TiedTeacher(inputs.teacher_hidden, mode="frozen")
        result = distillation_loss(
            inputs.student_hidden, inputs.student_head.weight, inputs.target_ids, teacher, **options
        )
        return Outcome(result.loss.detach(), differentiate(result.loss, inputs))

    return step
