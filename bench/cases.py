"""Cases to measure: an operation at a shape. `inputs` makes what every peer gets of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

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
        bars: by beta, what the ratio to the floor shall not exceed, where one is set.
        on_accelerator: meant for one; else for a CPU.
        peak_bar: the least share of the rate of multiply-adds on registers alone, where one is set.
        data: "random", or "smollm2": SmolLM2-135M's hidden states of real completions under real contexts.
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
    bars: Mapping[float, float] = field(default_factory=dict)
    on_accelerator: bool = False
    peak_bar: float | None = None
    data: Literal["random", "smollm2"] = "random"

    def divergence(self, beta: float) -> str:
        """Name of a divergence in tables."""
        if self.operation == "scoring":
            return "none"
        return {0.0: "forward KL", 1.0: "reverse KL"}.get(beta, f"JSD beta={beta:g}")

    @property
    def flops(self) -> int:
        """FLOPs of the floor."""
        return 2 * self.num_products * self.num_rows * self.hidden_size * self.vocab_size

    @property
    def bytes_read(self) -> int:
        """Head and hidden states once each: the least a step can read."""
        views = self.num_scorings + (0 if self.operation == "scoring" else 2)
        return (self.vocab_size + views * self.num_rows) * self.hidden_size * self.dtype.itemsize

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
HEADS = {
    "llama3.1-8b": (4096, 128256),
    "qwen2.5-7b": (3584, 152064),
    "qwen2.5-0.5b": (896, 151936),
    "gemma3-4b": (2560, 262208),
}
OPERATIONS: dict[str, dict[str, Any]] = {
    "kl": {"operation": "divergence", "num_auxiliary": 0, "options": {"temperature": 0.7}, "bars": {0.0: 1.15}},
    "kl_trainable": {
        "operation": "divergence",
        "num_auxiliary": 0,
        "options": {"temperature": 0.7},
        "frozen_head": False,
        "bars": {0.0: 1.15},
    },
    "unisd_star": {"operation": "unisd_loss", "bars": {0.0: 1.15}},
    "scoring": {"operation": "scoring", "num_auxiliary": 0, "options": {"temperature": 1.0}, "bars": {0.0: 1.1}},
}
HEADLINE_SHAPE, HEADLINE_ROWS = "llama3.1-8b", 8192
# 256 rows a sequence: the float64 reference of one sequence then fits (`accuracy.py`).
SEQUENCE_ROWS = 256


def _accelerator_case(shape: str, operation: str, num_rows: int) -> Case:
    headline = (shape, operation, num_rows) == (HEADLINE_SHAPE, "kl", HEADLINE_ROWS)
    return Case(
        f"{shape}.{operation}.{num_rows}",
        num_rows,
        *HEADS[shape],
        beta=(0.0, 0.5) if headline else (0.0,),
        dtype=torch.bfloat16,
        on_accelerator=True,
        num_sequences=num_rows // SEQUENCE_ROWS,
        **OPERATIONS[operation],
    )


def _accelerator_cases() -> list[Case]:
    """Cases of an accelerator in order of importance: Llama at N = 8192, the other heads, Llama at other N."""
    cases = [_accelerator_case("llama3.1-8b", operation, HEADLINE_ROWS) for operation in OPERATIONS]
    for shape in ("qwen2.5-0.5b", "qwen2.5-7b", "gemma3-4b"):
        cases += [_accelerator_case(shape, operation, HEADLINE_ROWS) for operation in OPERATIONS]
        cases.append(_accelerator_case(shape, "scoring", 256))
    for num_rows in (2048, 256, 32768):
        cases += [_accelerator_case("llama3.1-8b", operation, num_rows) for operation in OPERATIONS]
    return cases


ACCELERATOR_CASES = _accelerator_cases()


def _smoke(suffix: str, **settings: Any) -> Case:
    return Case(f"smoke.{suffix}", 32, 16, 500, **{"beta": (0.0,), **settings, "bars": {}})


def _cpu_case(operation: str, **settings: Any) -> Case:
    """SmolLM2-135M's head; the case that the CPU bars are set on. In bfloat16 as a model's weights come."""
    settings = {**OPERATIONS[operation], "bars": {}, **settings}
    suffix = "_bf16" if settings.get("dtype") == torch.bfloat16 else ""
    return Case(f"{operation}_cpu{suffix}", 512, 576, 49152, **settings)


# Of the library's products: in float32, and in bfloat16, whose floor takes less than half of that.
BF16 = torch.bfloat16
CPU_BARS, BFLOAT16_BARS = {0.0: 1.1, 0.5: 1.1}, {0.0: 1.25, 0.5: 1.25}
PEAK_BAR = 0.85
CASES = {
    case.name: case
    for case in (
        _cpu_case("unisd_star", bars=CPU_BARS, peak_bar=PEAK_BAR),
        _cpu_case("kl", beta=(0.0,), bars=CPU_BARS, peak_bar=PEAK_BAR),
        _cpu_case("kl_trainable", beta=(0.0,)),
        _cpu_case("scoring", beta=(0.0,)),
        # The same on what a model really computes.
        replace(_cpu_case("unisd_star", bars=CPU_BARS), name="unisd_star_smollm2", data="smollm2"),
        _cpu_case("scoring", dtype=BF16, beta=(0.0,)),
        _cpu_case("kl", dtype=BF16, bars=BFLOAT16_BARS),
        _cpu_case("unisd_star", dtype=BF16, bars=BFLOAT16_BARS),
        Case("qwen2.5-0.5b_cpu", 256, 896, 151936, beta=(0.0,)),
        Case("gemma3-270m_cpu", 256, 640, 262144, beta=(0.0,)),
        Case("gemma3-270m_cpu_bf16", 256, 640, 262144, beta=(0.0,), dtype=BF16),
        *ACCELERATOR_CASES,
        # Rehearsals of each operation.
        Case("smoke", 32, 16, 500),
        *(_smoke(name, **settings) for name, settings in OPERATIONS.items() if name != "unisd_star"),
        # One tiny step for a memory checker.
        Case("smoke.bf16", 96, 128, 1000, beta=(0.0,), dtype=torch.bfloat16, on_accelerator=True),
    )
}
# "scaling.unisd_star.N512.H576.V49152.K3": any shape by its name, so that a process of its own can be told it.
_SHAPED = re.compile(
    r"scaling\.(?P<operation>\w+)\.N(?P<rows>\d+)\.H(?P<hidden>\d+)\.V(?P<vocab>\d+)\.K(?P<views>\d+)(?P<bf16>\.bfloat16)?"
)


def shaped_case(
    operation: str,
    num_rows: int,
    hidden_size: int,
    vocab_size: int,
    num_auxiliary: int,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """A case of any shape; sequences of 128 rows, forward KL."""
    settings = {**OPERATIONS[operation], "num_auxiliary": num_auxiliary, "bars": {}, "dtype": dtype}
    name = f"scaling.{operation}.N{num_rows}.H{hidden_size}.V{vocab_size}.K{num_auxiliary}"
    if dtype != torch.float32:
        name += f".{str(dtype).removeprefix('torch.')}"
    sequences = max(1, num_rows // 128)
    return Case(name, num_rows, hidden_size, vocab_size, beta=(0.0,), num_sequences=sequences, **settings)


def find_case(name: str, device: torch.device) -> Case:
    """A case by its name, or an operation's name for the device's own case of it.

    Raises:
        ValueError: no such case.
    """
    found = _SHAPED.fullmatch(name)
    if found and found["operation"] in OPERATIONS:
        shape = (int(found[key]) for key in ("rows", "hidden", "vocab", "views"))
        return shaped_case(found["operation"], *shape, torch.bfloat16 if found["bf16"] else torch.float32)
    if name in OPERATIONS:
        name = f"{name}_cpu" if device.type == "cpu" else f"{HEADLINE_SHAPE}.{name}.{HEADLINE_ROWS}"
    if name not in CASES:
        raise ValueError(f"no case {name!r}; there are {', '.join([*OPERATIONS, *CASES])}")
    return CASES[name]
