"""A random call of a random operation: every corner that a user may meet, from one seed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from unisd_kernels import LMHead

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
OPERATIONS = ("divergence", "logprobs", "loss")
# One share of the mixture is next to nothing: float32 has no digit of it beside 1, or rounds 1 - share to 1.
EXTREME_BETAS = (1e-12, 2.0**-25, 1 - 2.0**-25)


@dataclass
class Case:
    """What one call is given. `student`, `teacher`, ... are [N, H], laid out in memory in some way."""

    seed: int
    operation: str
    dtype: torch.dtype
    student: torch.Tensor
    student_head: LMHead
    teacher: torch.Tensor
    teacher_head: LMHead
    ids: torch.Tensor
    cu: torch.Tensor
    temperature: float
    beta: float
    workspace: int | None
    upstream: list[torch.Tensor]
    wanted: list[str]
    views: list[torch.Tensor] = field(default_factory=list)
    negative: torch.Tensor | None = None
    token_weights: torch.Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def leaves(self) -> dict[str, torch.Tensor]:
        """The tensors that want a gradient, by the oracle's names."""
        tensors = {"hidden": self.student, "weight": self.student_head.weight, "bias": self.student_head.bias}
        return {name: tensors[name] for name in self.wanted}  # type: ignore[misc]


class Draw:
    """Random choices and tensors, all from one seed and the same on every machine: numpy's generator promises that for
    integers, so that values are made of integers."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        self._numpy = np.random.default_rng(seed)

    def log_uniform(self, low: float, high: float) -> float:
        return round(math.exp(self.choose.uniform(math.log(low), math.log(high))), 6)

    def values(self, *shape: int) -> torch.Tensor:
        """About normal, multiples of 2^-7."""
        sums = self._numpy.integers(-128, 129, size=(*shape, 3)).sum(-1)
        return torch.from_numpy(sums / 128.0)

    def laid_out(self, tensor: torch.Tensor) -> tuple[torch.Tensor, str]:
        """The same numbers, in memory some other way."""
        how = self.choose.choice(["plain", "plain", "transposed", "strided", "offset"])
        if tensor.dim() != 2 or 0 in tensor.shape:
            return tensor, "plain"
        rows, columns = tensor.shape
        if how == "transposed":
            return tensor.T.contiguous().T, how
        if how == "strided":
            wide = tensor.new_full((rows, 2 * columns + 1), 7.0)
            wide[:, : 2 * columns : 2] = tensor
            return wide[:, : 2 * columns : 2], how
        if how == "offset":
            longer = tensor.new_full((rows * columns + 1,), 7.0)
            longer[1:] = tensor.reshape(-1)
            return longer[1:].view(rows, columns), how
        return tensor, "plain"


def make_case(
    seed: int,
    operation: str | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    extreme_betas: tuple[float, ...] = EXTREME_BETAS,
) -> Case:
    draw = Draw(seed)
    choose = draw.choose
    operation = operation or choose.choice(OPERATIONS)
    dtype = choose.choice(dtypes)
    lengths = [choose.choice([0, 1, 2, 3, 5]) for _ in range(choose.randint(1, 4))]
    rows, hidden = sum(lengths), choose.choice([1, 2, 5, 16, 24, 33])
    columns = choose.choice([1, 2, 3, 7, 16, 40, 65, 130])
    padding = choose.choice([0, 0, 0, 3])
    shared = choose.random() < 0.6
    # How large the logits are, and how far apart the two models: from nearly equal to nothing in common.
    size = draw.log_uniform(0.01, 60.0)
    apart = choose.choice([0.0, draw.log_uniform(1e-4, 1.0), draw.log_uniform(1.0, 30.0)])
    temperature = choose.choice([1.0, 1.0, 0.7, draw.log_uniform(0.05, 5.0)])
    layouts = []

    def made(tensor: torch.Tensor) -> torch.Tensor:
        laid, how = draw.laid_out(tensor.to(dtype))
        layouts.append(how)
        return laid

    def head(scale: float, cap: float | None, like: LMHead | None = None) -> LMHead:
        if like is not None:
            return LMHead(like.weight.detach(), None if like.bias is None else like.bias.detach(), scale, cap, limit)
        weight = made(draw.values(columns + padding, hidden) * size / math.sqrt(hidden))
        bias = (draw.values(columns + padding) * size / 4).to(dtype) if choose.random() < 0.4 else None
        return LMHead(weight, bias, scale, cap, limit)

    limit = columns if padding else None
    scale = choose.choice([1.0, 1.0, 0.25, -1.5])
    cap = choose.choice([None, None, 2.0, 30.0])
    student_head = head(scale, cap)
    teacher_head = head(scale, cap, student_head) if shared else head(choose.choice([scale, 2.0]), cap)
    plain = draw.values(rows, hidden)
    student, teacher = made(plain), made(plain + apart * draw.values(rows, hidden))
    wanted = ["hidden", "weight", *(["bias"] if student_head.bias is not None else [])]
    wanted = [name for name in wanted if choose.random() < 0.6] or ["hidden"]
    case = Case(
        seed=seed,
        operation=operation,
        dtype=dtype,
        student=student,
        student_head=student_head,
        teacher=teacher,
        teacher_head=teacher_head,
        ids=torch.tensor(
            [choose.randrange(columns) for _ in range(rows)], dtype=choose.choice([torch.int32, torch.int64])
        ),
        cu=torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=choose.choice([torch.int32, torch.int64])),
        temperature=temperature,
        beta=choose.choice(
            [0.0, 0.0, 1.0, 0.5, 0.1, 0.9, 1e-6, 1 - 1e-6, draw.log_uniform(0.01, 0.99), *extreme_betas]
        ),
        workspace=choose.choice([None, 1 << 12, 1 << 14]),
        upstream=[draw.values(rows) * choose.choice([0.0, 1.0, 3.0]) for _ in range(3)],
        wanted=wanted,
    )
    if operation == "loss":
        case.views = [made(plain + draw.values(rows, hidden) / 2) for _ in range(choose.choice([0, 0, 1, 2, 3]))]
        case.negative = made(draw.values(rows, hidden)) if choose.random() < 0.5 else None
        case.token_weights = draw.values(rows).abs().to(torch.float64) if choose.random() < 0.3 else None
        case.options = {
            "clip_cap": choose.choice([None, None, draw.log_uniform(0.05, 5.0)]),
            "agreement": choose.choice(["token", "sequence"]),
            "agreement_statistic": choose.choice(["variance", "range"]),
            "agreement_gamma": choose.choice([0.001, 0.1, 1.0]),
            "weight_normalization": choose.choice([None, "weighted", "count"]),
            "contrastive_weight": choose.choice([0.0, 0.1, 1.0]),
            "contrastive_margin": choose.choice([0.0, 0.5, 3.0]),
            "feature_weight": choose.choice([0.0, 0.3]),
            "divergence_weight": choose.choice([1.0, 0.5, 0.0]),
            "normalization": choose.choice(["sequence", "token"]),
            "num_items": choose.choice([None, 7.0]),
        }
    case.about = {
        "rows": rows,
        "hidden": hidden,
        "columns": columns,
        "padding": padding,
        "shared": shared,
        "size": size,
        "apart": apart,
        "temperature": temperature,
        "beta": case.beta,
        "scale": scale,
        "cap": cap,
        "dtype": str(dtype),
        "bias": student_head.bias is not None,
        "layouts": layouts,
        "wanted": wanted,
        "workspace": case.workspace,
        **case.options,
    }
    for leaf in case.leaves.values():
        leaf.requires_grad_()
    if shared:  # the teacher's head is the student's memory, frozen
        case.teacher_head = head(scale, cap, student_head)
    return case
