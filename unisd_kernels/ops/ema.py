"""`ema_update_`: the moving average of the teacher's weights, in a form that does not stall in 16 bits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from unisd_kernels.backends import extension
from unisd_kernels.backends.registry import resolve
from unisd_kernels.config import check_choice, check_number


@torch.no_grad()
def ema_update_(
    teacher: Iterable[torch.Tensor],
    student: Iterable[torch.Tensor],
    decay: float,
    *,
    rounding: str | None = None,
    compensation: Sequence[torch.Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """`theta_t = decay theta_t + (1 - decay) theta_s`, in place. With decay 0 the teacher becomes the student,
    rounded to its dtype; with decay 1 nothing is touched.

    A 16-bit teacher stalls under this formula once the increment is below half an ulp (bfloat16 keeps 8 bits, so with
    decay 0.98 a relative difference under 20% already moves nothing). The arithmetic here is float32 in every
    case; what differs is where the low bits go:

    - float32 and float64 teachers (recommended: float32 shadow weights, whatever the student's dtype): plain.
    - 16-bit teacher with `compensation`: one 16-bit tensor a parameter holds what rounding dropped and is added back
      at the next update (deterministic; 16 to 22 bits in effect).
    - 16-bit teacher with `rounding="stochastic"`: up or down with the probability that makes the expectation exact
      (no extra memory; seeded through `generator`, whose state belongs in a checkpoint).
    - a 16-bit teacher with neither is refused.

    With the compiled library (`unisd_kernels.explain()`; on CUDA only if it was built) all contiguous tensors are
    updated in one pass that reads the student in its own dtype, and stochastic rounding gives the same bits for any
    number of threads. Without it PyTorch operations do the same, with other random draws.

    Args:
        teacher: parameters or buffers to update.
        student: as many, of the same shapes. Both in float32, float64, bfloat16 or float16, not necessarily the same.
        decay: in [0, 1].
        rounding: None or "stochastic".
        compensation: as many tensors as the teacher, same shapes and dtypes, initially zero; updated in place.
        generator: for stochastic rounding, on the teacher's device; None for torch's default one.

    Raises:
        ValueError, TypeError: counts, shapes or dtypes that do not fit; a 16-bit teacher that would stall.

    Source: docs/design.md. Compensated summation: Kahan 1965; stochastic rounding: Gupta et al., arXiv 1502.02551.
    """
    check_number("decay", decay, low=0.0, high=1.0)
    if rounding is not None:
        check_choice("rounding", rounding, ("stochastic",))
        if compensation is not None:
            raise ValueError("give either rounding='stochastic' or compensation, not both")
    targets, sources = list(teacher), list(student)
    if len(targets) != len(sources):
        raise ValueError(f"teacher has {len(targets)} tensors but student has {len(sources)}")
    if compensation is not None and len(compensation) != len(targets):
        raise ValueError(f"compensation has {len(compensation)} tensors but teacher has {len(targets)}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    for name, tensors in (("teacher", targets), ("student", sources), ("compensation", compensation or ())):
        for position, tensor in enumerate(tensors):
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(
                    f"tensor {position}: {name} must be a torch.Tensor, got {type(tensor).__name__}; pass "
                    "model.parameters(), or the values of a state dict"
                )
    for position, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target.shape != source.shape:
            raise ValueError(
                f"tensor {position}: teacher has shape {tuple(target.shape)} but student {tuple(source.shape)}"
            )
        for name, tensor in (("teacher", target), ("student", source)):
            if tensor.dtype not in _AVERAGED:
                raise TypeError(
                    f"tensor {position}: only float32, float64, bfloat16 and float16 tensors are averaged, got a "
                    f"{name} in {tensor.dtype}; leave it out, or convert it"
                )
        if target.dtype in (torch.bfloat16, torch.float16) and rounding is None and compensation is None:
            raise ValueError(
                f"tensor {position}: a {target.dtype} teacher stalls (increments below half an ulp are lost). Keep it "
                "in float32, or give compensation=[torch.zeros_like(p) ...] or rounding='stochastic'"
            )
        if compensation is not None:
            given, needs_grad = (
                f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
                for tensor in (compensation[position], target)
            )
            if given != needs_grad:
                raise ValueError(f"tensor {position}: compensation is {given}, the teacher {needs_grad}")

    if decay == 1.0:
        return
    beside = [None] * len(targets) if compensation is None else list(compensation)
    fused = [i for i, tensors in enumerate(zip(targets, sources, beside, strict=True)) if _can_be_fused(*tensors)]
    for device in {targets[i].device for i in fused}:
        chosen = [i for i in fused if targets[i].device == device]
        torch.ops.unisd.ema_update_(
            [targets[i].detach() for i in chosen],
            [sources[i].detach() for i in chosen],
            float(decay),
            [] if compensation is None else [compensation[i] for i in chosen],
            rounding is not None,
            _seed(generator) if rounding is not None else 0,
        )
    for i in sorted(set(range(len(targets))) - set(fused)):
        target = targets[i]
        source = sources[i].to(device=target.device, dtype=torch.promote_types(target.dtype, torch.float32))
        if target.dtype in (torch.float32, torch.float64):
            target.copy_(_average(target, source, decay))
        elif compensation is not None:
            value = _average(target.float().add_(compensation[i].float()), source, decay)
            target.copy_(value)
            compensation[i].copy_(value - target.float())
        else:
            target.copy_(_round_stochastically(_average(target.float(), source, decay), target.dtype, generator))


# Of teacher and student. float8 has no arithmetic, and its weights carry a scale elsewhere.
_AVERAGED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _average(teacher: torch.Tensor, student: torch.Tensor, decay: float) -> torch.Tensor:
    """`decay teacher + (1 - decay) student`, from the one that weighs more: csrc/ema_average.h says why."""
    if decay == 0.0:
        return student
    # lerp forms 1 - weight in the tensors' own precision, where a tiny decay is lost; a weight below a half is used as
    # it is.
    return student.lerp(teacher, decay) if decay < 0.5 else teacher.lerp(student, 1.0 - decay)


def _can_be_fused(target: torch.Tensor, source: torch.Tensor, compensation: torch.Tensor | None) -> bool:
    """All such tensors are updated in one pass by the compiled library; others one by one by PyTorch operations."""
    tensors = [tensor for tensor in (target, source, compensation) if tensor is not None]
    if any(tensor.device != target.device or not tensor.is_contiguous() for tensor in tensors):
        return False
    if target.device.type == "cpu":
        return resolve(None, target.device, torch.float32).name == "native"
    return target.device.type == "cuda" and extension.cuda_unavailable() is None


def _seed(generator: torch.Generator | None) -> int:
    """One draw an update; every random bit of the update follows from it."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


def _round_stochastically(value: torch.Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> torch.Tensor:
    """Round float32 to a 16-bit neighbour, up with the probability of the fraction that lies below."""
    nearest = value.to(dtype)
    wide = nearest.float()
    # The neighbour on the other side of `value`; where `value` is representable both are the same.
    direction = torch.where(value > wide, torch.inf, -torch.inf).to(dtype)
    other = torch.nextafter(nearest, direction)
    gap = (other.float() - wide).abs()
    fraction = torch.where(gap > 0, (value - wide).abs() / gap, torch.zeros_like(gap))
    draw = torch.rand(value.shape, generator=generator, device=value.device, dtype=torch.float32)
    return torch.where(draw < fraction, other, nearest)
