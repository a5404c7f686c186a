"""A loss with every mechanism, cut into slices of its vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from tests.support import Problem, make_problem
from unisd_kernels import LMHead, unisd_loss

V = 1009
# Every mechanism at once; the cap is in reach of some tokens.
EVERYTHING = {
    "temperature": 0.8,
    "agreement_gamma": 0.5,
    "contrastive_weight": 0.7,
    "contrastive_margin": 1.5,
    "feature_weight": 0.3,
    "return_entropy": True,
}


def whole_problem(dtype: torch.dtype = torch.float64, **settings: Any) -> Problem:
    """V = 1009, three auxiliary views, a negative one, an empty sequence, weights of tokens."""
    given = {
        "lengths": (9, 0, 14, 7),
        "hidden_size": 16,
        "vocab_size": V,
        "num_auxiliary": 3,
        "token_weights": True,
        "bias": True,
        "logit_scale": 0.7,
    }
    return make_problem(**{**given, **settings}, dtype=dtype)


def limits(rows: int, ranks: int) -> list[int]:
    """Bounds of slices of ceil(rows / ranks) rows, as DTensor cuts them."""
    width = -(-rows // ranks)
    return [min(rank * width, rows) for rank in range(ranks + 1)]


def sliced(problem: Problem, rank: int, group: Any, bounds: Sequence[int]) -> Problem:
    """The problem as one rank has it: its rows of every weight, as fresh leaves; heads that were one still are."""
    start, end = list(pairwise(bounds))[rank]
    made: dict[int, LMHead] = {}

    def cut(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.detach()[start:end].clone().requires_grad_(tensor.requires_grad)

    def slice_of(head: LMHead) -> LMHead:
        address = head.weight.data_ptr()
        if address not in made:
            constants = (head.logit_scale, head.softcap, head.vocab_size)
            made[address] = LMHead(cut(head.weight), cut(head.bias), *constants, start, group)
        return made[address] if head.weight.requires_grad else made[address].detach()

    arguments = problem.arguments()
    for name, value in arguments.items():
        if isinstance(value, LMHead):
            arguments[name] = slice_of(value)
    hidden = problem.student_hidden
    arguments["student_hidden"] = hidden.detach().clone().requires_grad_(hidden.requires_grad)
    return Problem(**arguments)


def loss_of(problem: Problem, **options: Any) -> dict[str, torch.Tensor]:
    """Every field of the loss, and the gradients of the leaves by name."""
    result = unisd_loss(**problem.arguments(), **options)
    found = {name: value.detach() for name, value in result._asdict().items() if value is not None}
    named = {"hidden": problem.student_hidden, "weight": problem.student_head.weight, "bias": problem.student_head.bias}
    leaves = {name: leaf for name, leaf in named.items() if leaf is not None and leaf.requires_grad}
    gradients = torch.autograd.grad(result.loss, list(leaves.values()))
    return found | {f"gradient of {name}": value for name, value in zip(leaves, gradients, strict=True)}


def joined(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One result of the ranks': gradients of weights side by side; everything else must be the same bits on all."""
    out = {}
    for name, value in parts[0].items():
        values = [part[name] for part in parts]
        if name in ("gradient of weight", "gradient of bias"):
            out[name] = torch.cat(values)
            continue
        for other in values[1:]:
            torch.testing.assert_close(value, other, rtol=0.0, atol=0.0, equal_nan=True, msg=f"{name} differs by rank")
        out[name] = value
    return out
