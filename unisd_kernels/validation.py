"""Checks of what users pass in. Every message says what was got and what to do about it.

Checks of values (are all ids inside the vocabulary?) read the tensor, so on an accelerator they would stall the
queue. There they become device-side assertions, which report without a synchronization.
"""

from __future__ import annotations

import torch

from unisd_kernels.heads import LMHead
from unisd_kernels.spec import LossInputs, LossSpec


def check_hidden(name: str, hidden: torch.Tensor, head: LMHead, head_name: str) -> None:
    """A [N, H] hidden state that fits its head in width, dtype and device."""
    if not isinstance(hidden, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor [N, H], got {type(hidden).__name__}")
    if not isinstance(head, LMHead):
        raise TypeError(
            f"{head_name} must be an LMHead, got {type(head).__name__}; use LMHead(weight) or LMHead.from_model(model)"
        )
    if hidden.dim() != 2:
        raise ValueError(
            f"{name} must have shape [N, H] (packed valid rows), got {tuple(hidden.shape)}; "
            "pack padded [B, T, H] states with unisd_kernels.pack_rows(mask, hidden, ids)"
        )
    if not hidden.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {hidden.dtype}")
    if hidden.shape[1] != head.hidden_size:
        raise ValueError(
            f"{name} has hidden size {hidden.shape[1]} but {head_name} expects {head.hidden_size} "
            f"(its weight is {tuple(head.weight.shape)})"
        )
    if hidden.device != head.weight.device:
        raise ValueError(f"{name} is on {hidden.device} but {head_name} is on {head.weight.device}; move one of them")
    if hidden.dtype != head.weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(
            f"{name} is {hidden.dtype} but {head_name} is {head.weight.dtype}; convert one of them, "
            "or run under torch.autocast"
        )


def check_same_rows(name: str, tensor: torch.Tensor, num_rows: int) -> None:
    if tensor.shape[0] != num_rows:
        raise ValueError(
            f"{name} has {tensor.shape[0]} rows but student_hidden has {num_rows}; every view must score the same "
            "packed completion tokens"
        )


def check_heads_match(student: LMHead, teacher: LMHead, name: str = "teacher_head") -> None:
    if student.num_columns != teacher.num_columns:
        raise ValueError(
            f"student_head has {student.num_columns} columns but {name} has {teacher.num_columns}; if one of them is "
            "padded, pass LMHead(..., vocab_size=<number of real tokens>) for both"
        )


def check_target_ids(target_ids: torch.Tensor, num_rows: int, num_columns: int, device: torch.device) -> None:
    if not isinstance(target_ids, torch.Tensor):
        raise TypeError(f"target_ids must be a torch.Tensor [N], got {type(target_ids).__name__}")
    if target_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target_ids must be int64 or int32, got {target_ids.dtype}")
    if target_ids.shape != (num_rows,):
        raise ValueError(f"target_ids must have shape [{num_rows}], one id a row, got {tuple(target_ids.shape)}")
    if target_ids.device != device:
        raise ValueError(f"target_ids is on {target_ids.device} but the hidden states are on {device}")
    if num_rows == 0:
        return
    if device.type == "cpu":
        low, high = int(target_ids.min()), int(target_ids.max())
        if low < 0 or high >= num_columns:
            raise ValueError(
                f"target_ids must lie in [0, {num_columns}), got values from {low} to {high}; drop ignored positions "
                "(-100) before packing, and check that tokenizer and head belong together"
            )
    else:
        torch._assert_async(
            ((target_ids >= 0) & (target_ids < num_columns)).all(), f"target_ids outside [0, {num_columns})"
        )


def check_cu_seqlens(cu_seqlens: torch.Tensor, num_rows: int, device: torch.device) -> None:
    if not isinstance(cu_seqlens, torch.Tensor):
        raise TypeError(f"cu_seqlens must be a torch.Tensor [B + 1], got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens must have shape [B + 1], got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} but the hidden states are on {device}")
    proper = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == num_rows) & (cu_seqlens.diff() >= 0).all()
    if device.type != "cpu":
        torch._assert_async(proper, f"cu_seqlens must rise from 0 to {num_rows}")
    elif not bool(proper):
        raise ValueError(
            f"cu_seqlens must start at 0, end at the number of rows ({num_rows}) and never fall, "
            f"got {cu_seqlens.tolist() if cu_seqlens.numel() <= 16 else cu_seqlens}"
        )


def check_workspace(workspace_bytes: int | None) -> None:
    if workspace_bytes is None:
        return
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int):
        raise TypeError(f"workspace_bytes must be an int or None, got {type(workspace_bytes).__name__}")
    if workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes must be > 0, got {workspace_bytes}")


def autocast_operands(
    hidden: torch.Tensor, head: LMHead, like: tuple[LMHead, LMHead] | None = None
) -> tuple[torch.Tensor, LMHead]:
    """What autocast would feed a linear layer: both operands in the autocast dtype. Differentiable; the identity
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
    return hidden.to(dtype), LMHead(weight, bias, head.logit_scale, head.softcap, head.vocab_size)


def check_loss_inputs(inputs: LossInputs, spec: LossSpec) -> None:
    """All of `unisd_loss`'s tensors: shapes, dtypes, devices, and on a CPU the values of ids and offsets."""
    check_hidden("student_hidden", inputs.student_hidden, inputs.student_head, "student_head")
    num_rows, device = inputs.num_rows, inputs.student_hidden.device
    others: list[tuple[str, torch.Tensor, LMHead, str]] = [
        ("teacher_hidden", inputs.teacher_hidden, inputs.teacher_head, "teacher_head")
    ]
    if inputs.negative_hidden is not None:
        head_name = "teacher_head" if inputs.negative_head is None else "negative_head"
        head = inputs.negative_head or inputs.teacher_head
        others.append(("negative_hidden", inputs.negative_hidden, head, head_name))
    for k, hidden in enumerate(inputs.auxiliary_hidden):
        head_name = "teacher_head" if inputs.auxiliary_head is None else "auxiliary_head"
        others.append((f"auxiliary_hidden[{k}]", hidden, inputs.auxiliary_head or inputs.teacher_head, head_name))
    for name, hidden, head, head_name in others:
        check_hidden(name, hidden, head, head_name)
        check_same_rows(name, hidden, num_rows)
        check_heads_match(inputs.student_head, head, head_name)
        if hidden.device != device:
            raise ValueError(f"{name} is on {hidden.device} but student_hidden is on {device}; move one of them")
    check_target_ids(inputs.target_ids, num_rows, inputs.student_head.num_columns, device)
    check_cu_seqlens(inputs.cu_seqlens, num_rows, device)
    if spec.feature_weight > 0 and inputs.student_hidden.shape != inputs.teacher_hidden.shape:
        raise ValueError(
            f"feature matching compares hidden states of one width, got {tuple(inputs.student_hidden.shape)} and "
            f"{tuple(inputs.teacher_hidden.shape)}; set feature_weight=0 for models of different width"
        )
    weights = inputs.token_weights
    if weights is not None:
        if not isinstance(weights, torch.Tensor) or not weights.is_floating_point():
            raise TypeError("token_weights must be a floating-point torch.Tensor [N]")
        if weights.shape != (num_rows,):
            raise ValueError(f"token_weights must have shape [{num_rows}], got {tuple(weights.shape)}")
        if weights.requires_grad:
            raise ValueError("token_weights must not require a gradient (no gradient flows through weights); detach it")
    if isinstance(inputs.num_items, (int, float)) and not inputs.num_items > 0:
        raise ValueError(f"num_items must be > 0, got {inputs.num_items}")
