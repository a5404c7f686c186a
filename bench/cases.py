"""What is measured: an operation at a shape, and the inputs every contender gets."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from unisd_kernels import LMHead


@dataclass(frozen=True)
class Case:
    """One UniSD loss, forward and backward, on packed completion rows.

    Attributes:
        name: of the case.
        num_rows, hidden_size, vocab_size: N, H, V.
        num_auxiliary: K.
        beta: divergences to measure, each a row of the table.
        frozen_head: LoRA's case.
        dtype: of hidden states and head.
        options: further arguments of `unisd_loss`.
    """

    name: str
    num_rows: int
    hidden_size: int
    vocab_size: int
    num_auxiliary: int = 3
    beta: tuple[float, ...] = (0.0, 0.5)
    frozen_head: bool = True
    dtype: torch.dtype = torch.float32
    num_sequences: int = 8
    options: dict = field(
        default_factory=lambda: {
            "temperature": 0.7,
            "agreement_gamma": 0.001,
            "contrastive_weight": 0.01,
            "contrastive_margin": 0.1,
            "feature_weight": 0.01,
        }
    )

    @property
    def num_products(self) -> int:
        """Matrix products of 2 N H V FLOPs of the minimum: K auxiliary, negative, student, teacher, dh (and dW)."""
        return self.num_auxiliary + 4 + (not self.frozen_head)


CASES = {
    case.name: case
    for case in (
        # SmolLM2-135M's head; the case that the CPU bars are set on.
        Case("unisd_star_cpu", 1024, 576, 49152),
        Case("qwen2.5-0.5b_cpu", 512, 896, 151936),
        Case("gemma3-270m_cpu", 512, 640, 262144),
        # For one accelerator: Llama-3.1-8B, Qwen2.5-7B, Qwen2.5-0.5B, Gemma-3-4B.
        Case("llama3.1-8b", 8192, 4096, 128256, dtype=torch.bfloat16),
        Case("llama3.1-8b_trainable", 8192, 4096, 128256, frozen_head=False, dtype=torch.bfloat16),
        Case("qwen2.5-7b", 8192, 3584, 152064, dtype=torch.bfloat16),
        Case("qwen2.5-0.5b", 8192, 896, 151936, dtype=torch.bfloat16),
        Case("gemma3-4b", 8192, 2560, 262208, dtype=torch.bfloat16),
        Case("smoke", 32, 16, 500),
    )
}


@dataclass(frozen=True)
class Inputs:
    """Random hidden states of a plausible scale: logits of standard deviation 3, teacher near the student."""

    case: Case
    student_hidden: torch.Tensor
    teacher_hidden: torch.Tensor
    negative_hidden: torch.Tensor
    auxiliary_hidden: list[torch.Tensor]
    head: LMHead
    target_ids: torch.Tensor
    cu_seqlens: torch.Tensor


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(case.dtype)

    weight = normal(case.vocab_size, case.hidden_size, scale=3.0 / case.hidden_size**0.5)
    student = normal(case.num_rows, case.hidden_size, scale=1.0)

    def near(scale: float) -> torch.Tensor:
        return student + normal(case.num_rows, case.hidden_size, scale=scale)

    bounds = torch.linspace(0, case.num_rows, case.num_sequences + 1, device=device).to(torch.int32)
    return Inputs(
        case=case,
        student_hidden=student.clone().requires_grad_(),
        teacher_hidden=near(0.2),
        negative_hidden=near(0.4),
        auxiliary_hidden=[near(0.3) for _ in range(case.num_auxiliary)],
        head=LMHead(weight.requires_grad_(not case.frozen_head)),
        target_ids=torch.randint(0, case.vocab_size, (case.num_rows,), generator=generator, device=device),
        cu_seqlens=bounds,
    )
