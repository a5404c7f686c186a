"""Operands under `torch.autocast`: cast as a linear layer's would be, before the operations switch it off."""

from __future__ import annotations

from dataclasses import replace

import torch

from unisd_kernels.config import LossInputs
from unisd_kernels.heads import LMHead


def autocast_operands(
    hidden: torch.Tensor, head: LMHead, like: tuple[LMHead, LMHead] | None = None
) -> tuple[torch.Tensor, LMHead]:
    """Both operands in the autocast dtype, as autocast would feed them to a linear layer. Differentiable; the identity
    outside autocast and for float64.

    Args:
        like: another head and what this function made of it. A head in the same memory, without a gradient of its own,
            takes that over: one copy is held, and both are still seen to be one head.
    """
    device_type = hidden.device.type
    if not torch.is_autocast_enabled(device_type) or hidden.dtype == torch.float64:
        return hidden, head
    dtype = torch.get_autocast_dtype(device_type)

    def narrow(name: str) -> torch.Tensor | None:
        tensor = getattr(head, name)
        # Addresses are not there to be seen while torch.compile traces.
        if tensor is None or like is None or tensor.requires_grad or torch.compiler.is_compiling():
            return None if tensor is None else tensor.to(dtype)
        other, made = (getattr(each, name) for each in like)
        same = other is not None and tensor.data_ptr() == other.data_ptr() and tensor.shape == other.shape
        return made.detach() if same and tensor.stride() == other.stride() else tensor.to(dtype)

    weight, bias = narrow("weight"), narrow("bias")
    assert weight is not None
    return hidden.to(dtype), replace(head, weight=weight, bias=bias)


def autocast_inputs(inputs: LossInputs) -> LossInputs:
    """`autocast_operands` of every view of a loss."""
    if not torch.is_autocast_enabled(inputs.student_hidden.device.type):
        return inputs
    student_hidden, student_head = autocast_operands(inputs.student_hidden, inputs.student_head)
    like = (inputs.student_head, student_head)

    def narrow(head: LMHead | None) -> LMHead | None:
        return None if head is None else autocast_operands(inputs.teacher_hidden, head, like)[1]

    teacher_hidden, teacher_head = autocast_operands(inputs.teacher_hidden, inputs.teacher_head, like)
    dtype = student_hidden.dtype
    return replace(
        inputs,
        student_hidden=student_hidden,
        student_head=student_head,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
        auxiliary_hidden=tuple(hidden.to(dtype) for hidden in inputs.auxiliary_hidden),
        auxiliary_head=narrow(inputs.auxiliary_head),
        negative_hidden=None if inputs.negative_hidden is None else inputs.negative_hidden.to(dtype),
        negative_head=narrow(inputs.negative_head),
    )
