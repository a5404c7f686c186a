"""What is measured: an operation at a shape, and the inputs every contender gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from unisd_kernels import LMHead

Operation = Literal["unisd_loss", "divergence", "scoring"]

UNISD_STAR = {
    "temperature": 0.7,
    "agreement_gamma": 0.001,
    "contrastive_weight": 0.01,
    "contrastive_margin": 0.1,
    "feature_weight": 0.01,
}


@dataclass(frozen=True)
class Case:
    """One operation on packed completion rows: forward and backward of a loss, or a scoring without gradient.

    Attributes:
        name: of the case.
        num_rows, hidden_size, vocab_size: N, H, V.
        operation: "unisd_loss": the UniSD* loss of K auxiliary views, negative, student and teacher.
            "divergence": the per-token divergence D_n and the gradient of `sum_n u_n D_n` with random u (`Inputs`).
            "scoring": the log-probability of one target id a row; no gradient.
        num_auxiliary: K; 0 but for "unisd_loss".
        beta: divergences to measure, each a row of the table.
        frozen_head: LoRA's case.
        dtype: of hidden states and head.
        options: further arguments of the operation.
        bar: what the ratio to the floor shall not exceed, where one is set.
    """

    name: str
    num_rows: int
    hidden_size: int
    vocab_size: int
    operation: Operation = "unisd_loss"
    num_auxiliary: int = 3
    beta: tuple[float, ...] = (0.0, 0.5)
    frozen_head: bool = True
    dtype: torch.dtype = torch.float32
    num_sequences: int = 8
    options: dict[str, Any] = field(default_factory=lambda: dict(UNISD_STAR))
    bar: float | None = None

    @property
    def num_scorings(self) -> int:
        """Forward products whose logits are needed for one log-probability a row only."""
        return {"unisd_loss": self.num_auxiliary + 1, "divergence": 0, "scoring": 1}[self.operation]

    @property
    def num_forward_products(self) -> int:
        """Products that make logits: the scorings, and student and teacher of a divergence."""
        return self.num_scorings + (0 if self.operation == "scoring" else 2)

    @property
    def num_products(self) -> int:
        """Matrix products of 2 N H V FLOPs of the minimum: every forward one, dh, and dW of a trainable head."""
        if self.operation == "scoring":
            return self.num_forward_products
        return self.num_forward_products + 1 + (not self.frozen_head)


# (H, V) of the heads of one accelerator's cases.
SHAPES = {
    "llama3.1-8b": (4096, 128256),
    "qwen2.5-7b": (3584, 152064),
    "qwen2.5-0.5b": (896, 151936),
    "gemma3-4b": (2560, 262208),
}
OPERATIONS: dict[str, dict[str, Any]] = {
    "kl": {"operation": "divergence", "num_auxiliary": 0, "options": {"temperature": 0.7}, "bar": 1.15},
    "kl_trainable": {
        "operation": "divergence",
        "num_auxiliary": 0,
        "options": {"temperature": 0.7},
        "frozen_head": False,
        "bar": 1.15,
    },
    "unisd_star": {"operation": "unisd_loss", "bar": 1.15},
    "scoring": {"operation": "scoring", "num_auxiliary": 0, "options": {"temperature": 1.0}, "bar": 1.1},
}
HEADLINE_ROWS = 8192
# 256 rows a sequence: the float64 reference of one sequence then fits (`accuracy.py`).
SEQUENCE_ROWS = 256


def _accelerator_case(shape: str, operation: str, num_rows: int) -> Case:
    return Case(
        f"{shape}.{operation}.{num_rows}",
        num_rows,
        *SHAPES[shape],
        beta=(0.0,),
        dtype=torch.bfloat16,
        num_sequences=num_rows // SEQUENCE_ROWS,
        **OPERATIONS[operation],
    )


def _accelerator_cases() -> list[Case]:
    """In order of importance: Llama at N = 8192, the other heads, Llama at other N."""
    cases = [_accelerator_case("llama3.1-8b", operation, HEADLINE_ROWS) for operation in OPERATIONS]
    for shape in ("qwen2.5-0.5b", "qwen2.5-7b", "gemma3-4b"):
        cases += [_accelerator_case(shape, operation, HEADLINE_ROWS) for operation in OPERATIONS]
        cases.append(_accelerator_case(shape, "scoring", 256))
    for num_rows in (2048, 256, 32768):
        cases += [_accelerator_case("llama3.1-8b", operation, num_rows) for operation in OPERATIONS]
    return cases


ACCELERATOR_CASES = _accelerator_cases()


def _smoke(suffix: str, **settings: Any) -> Case:
    settings = {"beta": (0.0,), **settings}
    del settings["bar"]
    return Case(f"smoke.{suffix}", 32, 16, 500, **settings)


CASES = {
    case.name: case
    for case in (
        # SmolLM2-135M's head; the case that the CPU bars are set on.
        Case("unisd_star_cpu", 1024, 576, 49152),
        Case("qwen2.5-0.5b_cpu", 512, 896, 151936),
        Case("gemma3-270m_cpu", 512, 640, 262144),
        *ACCELERATOR_CASES,
        # Rehearsals of each operation.
        Case("smoke", 32, 16, 500),
        *(_smoke(name, **settings) for name, settings in OPERATIONS.items() if name != "unisd_star"),
        # One tiny step for a memory checker.
        Case("smoke.bf16", 96, 128, 1000, beta=(0.0,), dtype=torch.bfloat16),
    )
}


@dataclass(frozen=True)
class Inputs:
    """Random hidden states of a plausible scale: logits of standard deviation 3, teacher near the student.

    `token_weights` are random in [0.5, 1.5]; `upstream` are u_n = w_n / (B n_b), with which `sum_n u_n D_n` is what
    `unisd_loss` computes from these weights with `weight_normalization="count"`. `negative_hidden` and
    `auxiliary_hidden` exist for "unisd_loss" only.
    """

    case: Case
    student_hidden: torch.Tensor
    teacher_hidden: torch.Tensor
    negative_hidden: torch.Tensor | None
    auxiliary_hidden: list[torch.Tensor]
    head: LMHead
    target_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    token_weights: torch.Tensor
    upstream: torch.Tensor

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        """What a backward makes gradients for; the student's hidden states come first."""
        return (self.student_hidden,) if self.case.frozen_head else (self.student_hidden, self.head.weight)


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(case.dtype)

    weight = normal(case.vocab_size, case.hidden_size, scale=3.0 / case.hidden_size**0.5)
    student = normal(case.num_rows, case.hidden_size, scale=1.0)

    def near(scale: float) -> torch.Tensor:
        return student + normal(case.num_rows, case.hidden_size, scale=scale)

    bounds = torch.linspace(0, case.num_rows, case.num_sequences + 1, device=device).to(torch.int32)
    teacher = near(0.2)
    negative = near(0.4) if case.operation == "unisd_loss" else None
    auxiliary = [near(0.3) for _ in range(case.num_auxiliary)]
    target_ids = torch.randint(0, case.vocab_size, (case.num_rows,), generator=generator, device=device)
    token_weights = 0.5 + torch.rand(case.num_rows, generator=generator, device=device)
    lengths = bounds.diff()
    counts = torch.repeat_interleave(lengths, lengths)
    return Inputs(
        case=case,
        student_hidden=student.clone().requires_grad_(),
        teacher_hidden=teacher,
        negative_hidden=negative,
        auxiliary_hidden=auxiliary,
        head=LMHead(weight.requires_grad_(not case.frozen_head)),
        target_ids=target_ids,
        cu_seqlens=bounds,
        token_weights=token_weights,
        upstream=token_weights / (case.num_sequences * counts),
    )
