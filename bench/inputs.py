"""What every contender gets: hidden states, a head, ids; and several sets of them, for a cache to be of no use.

A step that is timed again and again on the same tensors finds in the last-level cache what a training step would have
to fetch. So contenders go round several sets, of which no one is still there when its turn comes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.cases import Case
from unisd_kernels import LMHead

MOST_SETS = 8
_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_KIBI, _MEBI = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Inputs:
    """Random data are hidden states of a plausible scale: logits of standard deviation 3, teacher near the student.

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
    make = {"random": _random_tensors, "smollm2": _real_tensors}[case.data]
    student, teacher, negative, auxiliary, weight, target_ids, bounds = make(case, device, generator)
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
        upstream=token_weights / (len(lengths) * counts),
    )


_Tensors = tuple[
    torch.Tensor,
    torch.Tensor,
    "torch.Tensor | None",
    "list[torch.Tensor]",
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]


def _random_tensors(case: Case, device: torch.device, generator: torch.Generator) -> _Tensors:
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
    return student, teacher, negative, auxiliary, weight, target_ids, bounds


def _real_tensors(case: Case, device: torch.device, generator: torch.Generator) -> _Tensors:
    """The same data whatever the seed: a model has one head."""
    from bench.real_inputs import real_views

    views = real_views(case.num_rows, case.num_auxiliary, device)
    if views.weight.shape != (case.vocab_size, case.hidden_size):
        raise ValueError(
            f"{case.name}: the model's head is {tuple(views.weight.shape)}, the case's "
            f"{(case.vocab_size, case.hidden_size)}"
        )
    negative = views.negative_hidden.to(case.dtype) if case.operation == "unisd_loss" else None
    return (
        views.student_hidden.to(case.dtype),
        views.teacher_hidden.to(case.dtype),
        negative,
        [hidden.to(case.dtype) for hidden in views.auxiliary_hidden],
        views.weight.detach().to(case.dtype),
        views.target_ids,
        views.cu_seqlens,
    )


def sets_for(bytes_read: int, cache_bytes: int) -> int:
    """How many sets leave nothing of one in the cache when its turn comes again: the others fill it."""
    return min(MOST_SETS, 1 + max(1, math.ceil(cache_bytes / max(1, bytes_read))))


def more_inputs(inputs: Inputs, device: torch.device) -> list[Inputs]:
    """The given inputs and as many others of their case as `sets_for` asks for; real data are copied."""
    case = inputs.case
    sets = [inputs]
    for seed in range(1, sets_for(case.bytes_read, last_level_cache_bytes(device))):
        sets.append(make_inputs(case, device, seed) if case.data == "random" else _copied(inputs))
    return sets


def _copied(inputs: Inputs) -> Inputs:
    head = LMHead(inputs.head.weight.detach().clone().requires_grad_(inputs.head.weight.requires_grad))
    return replace(
        inputs,
        student_hidden=inputs.student_hidden.detach().clone().requires_grad_(),
        teacher_hidden=inputs.teacher_hidden.clone(),
        negative_hidden=None if inputs.negative_hidden is None else inputs.negative_hidden.clone(),
        auxiliary_hidden=[hidden.clone() for hidden in inputs.auxiliary_hidden],
        head=head,
    )


def last_level_cache_bytes(device: torch.device) -> int:
    """Of an accelerator its L2; of a CPU the largest that the system tells of, 64 MiB where it tells of none."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": _KIBI, "M": _MEBI}
    sizes = [path.read_text().strip() for path in _CPU_CACHES.glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=64 * _MEBI)
