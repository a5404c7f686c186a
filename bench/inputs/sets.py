"""The tensors of a case, which every peer gets, in several sets, for a cache to be of no use.

A step that is timed again and again on the same tensors finds in the last-level cache what a training step would have
to fetch. So peers go round several sets, of which no one is still there when its turn comes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from bench.cases import Case
from bench.inputs.random import random_inputs
from unisd_kernels import LMHead
from unisd_kernels.config import LossInputs

MOST_SETS = 8
_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_KIBI, _MEBI = 1 << 10, 1 << 20
Result = TypeVar("Result")


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> LossInputs:
    """The tensors of a case; of real data the same whatever the seed, since a model has one head.

    `token_weights` [N] exist for "divergence" only: u_n = w_n / (B n_b) with w_n random in [0.5, 1.5], n_b the length
    of the row's sequence, B their number.
    """
    generator = torch.Generator(device).manual_seed(seed)
    inputs = random_inputs(case, device, generator) if case.data == "random" else _real_inputs(case, device)
    weights = None
    if case.operation == "divergence":
        lengths = inputs.cu_seqlens.diff()
        weights = 0.5 + torch.rand(case.num_rows, generator=generator, device=device)
        weights = weights / (len(lengths) * torch.repeat_interleave(lengths, lengths))
    return _with_leaves(replace(inputs, token_weights=weights), trainable=not case.frozen_head)


def _with_leaves(inputs: LossInputs, trainable: bool) -> LossInputs:
    """The same numbers, in leaves of a graph where a gradient is wanted."""
    head = LMHead(inputs.student_head.weight.requires_grad_(trainable))
    return replace(
        inputs,
        student_hidden=inputs.student_hidden.clone().requires_grad_(),
        student_head=head,
        teacher_head=head.detach(),
    )


def _real_inputs(case: Case, device: torch.device) -> LossInputs:
    from bench.inputs.smollm2 import real_views

    views = real_views(case.num_rows, case.num_auxiliary, device)
    weight = views.student_head.weight
    if weight.shape != (case.vocab_size, case.hidden_size):
        raise ValueError(
            f"{case.name}: the model's head is {tuple(weight.shape)}, the case's {(case.vocab_size, case.hidden_size)}"
        )
    assert views.negative_hidden is not None
    head = LMHead(weight.detach().to(case.dtype))
    return replace(
        views,
        student_hidden=views.student_hidden.to(case.dtype),
        student_head=head,
        teacher_hidden=views.teacher_hidden.to(case.dtype),
        teacher_head=head,
        auxiliary_hidden=tuple(hidden.to(case.dtype) for hidden in views.auxiliary_hidden),
        negative_hidden=views.negative_hidden.to(case.dtype) if case.operation == "unisd_loss" else None,
    )


def rotating(step: Callable[[LossInputs], Result], sets: Sequence[LossInputs], start: int) -> Callable[[], Result]:
    """The step on one set of inputs after the other, from the given one."""
    turns = itertools.cycle([*sets[start % len(sets) :], *sets[: start % len(sets)]])
    return lambda: step(next(turns))


def more_inputs(case: Case, inputs: LossInputs, device: torch.device) -> list[LossInputs]:
    """The given inputs and as many others of their case as `sets_for` asks for; real data are copied."""
    sets = [inputs]
    for seed in range(1, sets_for(case.bytes_read, last_level_cache_bytes(device))):
        sets.append(make_inputs(case, device, seed) if case.data == "random" else _copied(inputs))
    return sets


def sets_for(bytes_read: int, cache_bytes: int) -> int:
    """Number of sets that leave nothing of one in the cache when its turn comes again: the others fill it."""
    return min(MOST_SETS, 1 + max(1, math.ceil(cache_bytes / max(1, bytes_read))))


def _copied(inputs: LossInputs) -> LossInputs:
    """The same numbers elsewhere in memory."""
    weight = inputs.student_head.weight
    copied = replace(
        inputs,
        student_hidden=inputs.student_hidden.detach(),
        student_head=LMHead(weight.detach().clone()),
        teacher_hidden=inputs.teacher_hidden.clone(),
        auxiliary_hidden=tuple(hidden.clone() for hidden in inputs.auxiliary_hidden),
        negative_hidden=None if inputs.negative_hidden is None else inputs.negative_hidden.clone(),
    )
    return _with_leaves(copied, trainable=weight.requires_grad)


def last_level_cache_bytes(device: torch.device) -> int:
    """An accelerator's L2; a CPU's largest cache that the system tells of, 64 MiB where it tells of none."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": _KIBI, "M": _MEBI}
    sizes = [path.read_text().strip() for path in _CPU_CACHES.glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=64 * _MEBI)
