"""The products whose tiles are measured: the rows that the walks use at the heads of `bench/cases.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.cases import CASES, HEADS
from bench.roofline.expected import Assumptions, Model
from unisd_kernels.backends.base import NeedsGrad, RunningScores
from unisd_kernels.backends.projection import Projection
from unisd_kernels.backends.triton.backend import TritonBackend
from unisd_kernels.heads import LMHead

MAIN_HEADS = ("llama3.1-8b", "qwen2.5-0.5b", "gemma3-4b")
FEW_ROWS = 64
# So much that the operation takes all rows at once.
_WORKSPACE = 64 << 30


@dataclass(frozen=True)
class Shape:
    """A product of [rows, width] and [columns, width]; of two views for a divergence.

    Attributes:
        kind: of `unisd_kernels.backends.triton.configs`.
        name: of the head.
    """

    kind: str
    name: str
    rows: int
    width: int
    columns: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def views(self) -> int:
        return 2 if self.kind.startswith("fused-divergence") else 1

    @property
    def flops(self) -> float:
        return 2.0 * self.views * self.rows * self.width * self.columns

    def as_json(self) -> dict[str, Any]:
        sizes = {"rows": self.rows, "width": self.width, "columns": self.columns}
        return {"kind": self.kind, "name": self.name, **sizes, "views": self.views, "flops": self.flops}


def _shapes() -> tuple[Shape, ...]:
    """The headline's first, then the other heads, then few rows."""

    def block(head: str, operation: str) -> int:
        return Model(CASES[f"{head}.{operation}.8192"]).rows("fused").block

    shapes = []
    for head in MAIN_HEADS:
        rows = [block(head, "kl")]
        if head == MAIN_HEADS[0]:
            rows.append(block(head, "kl_trainable"))
        shapes += [Shape("fused-divergence", head, count, *HEADS[head]) for count in rows]
        shapes.append(Shape("score", head, Assumptions().scoring_rows, *HEADS[head]))
    return (*shapes, *(Shape("score-few", head, FEW_ROWS, *HEADS[head]) for head in MAIN_HEADS))


SHAPES = _shapes()


def _operands(shape: Shape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student, teacher near it, weight."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, scale: float) -> torch.Tensor:
        return (torch.randn(rows, shape.width, generator=generator, device=device) * scale).to(shape.dtype)

    student = normal(shape.rows, 1.0)
    return student, student + normal(shape.rows, 0.2), normal(shape.columns, 3.0 / shape.width**0.5)


def operation(shape: Shape, device: torch.device) -> Callable[[], object]:
    """Runs the operation whose product is of this shape once."""
    student_hidden, teacher_hidden, weight = _operands(shape, device)
    head = LMHead(weight)
    student = Projection.of(student_hidden, head, 1.0)
    targets = torch.arange(shape.rows, device=device) % shape.columns
    rows = slice(0, shape.rows)
    if shape.views == 1:

        def score() -> None:
            logsumexp, target_logits = torch.zeros(2, shape.rows, device=device)
            running = RunningScores(logsumexp, target_logits, None)
            TritonBackend().score(student, rows, targets, running, _WORKSPACE)

        return score
    teacher = Projection.of(teacher_hidden, head, 1.0)
    walk = TritonBackend("fused").divergence(student, teacher, 0.0, _WORKSPACE, NeedsGrad(hidden=True), True)

    def pair() -> None:
        walk.forward(walk.logits(rows), rows, rows, targets, False)

    return pair


def library_products(shape: Shape, device: torch.device) -> Callable[[], object]:
    """Launch as many bare products, into a matrix of the operands' dtype."""
    student, teacher, weight = _operands(shape, device)
    out = torch.empty(shape.rows, shape.columns, dtype=shape.dtype, device=device)

    def step() -> None:
        for hidden in (student, teacher)[: shape.views]:
            torch.mm(hidden, weight.T, out=out)

    return step
