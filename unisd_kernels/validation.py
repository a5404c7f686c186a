"""Checks of arguments. Every message says what was got and what to do about it.

Checks of values (are all ids inside the vocabulary?) read the tensor, so on an accelerator they would stall the
queue. There they become device-side assertions, which report without a synchronization.
"""

from __future__ import annotations

import torch

from unisd_kernels.config import LossConfig, LossInputs, check_number
from unisd_kernels.dtypes import statistics_dtype
from unisd_kernels.heads import LMHead

# Of hidden states and heads. float8 has no arithmetic of its own, and its scale is kept elsewhere.
_OPERANDS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _check_tensor(name: str, value: object, shape: str) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {shape}, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense torch.Tensor {shape}, got one with layout {value.layout}")


def _check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} but the hidden states are on {device}; move one of them")


def check_operand_dtype(name: str, tensor: torch.Tensor) -> None:
    """A floating-point dtype that can be computed with."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if tensor.dtype not in _OPERANDS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}; convert it first")


def check_head(name: str, head: object) -> None:
    if not isinstance(head, LMHead):
        raise TypeError(
            f"{name} must be an LMHead, got {type(head).__name__}; use LMHead(weight) or LMHead.from_model(model)"
        )


def check_hidden(name: str, hidden: torch.Tensor, head: LMHead, head_name: str) -> None:
    """A [N, H] hidden state that fits its head in width, dtype and device."""
    _check_tensor(name, hidden, "[N, H]")
    check_head(head_name, head)
    if hidden.dim() != 2:
        raise ValueError(
            f"{name} must have shape [N, H] (packed valid rows), got {tuple(hidden.shape)}; "
            "pack padded [B, T, H] states with unisd_kernels.pack_rows(mask, hidden, ids)"
        )
    check_operand_dtype(name, hidden)
    if hidden.shape[1] != head.hidden_size:
        raise ValueError(
            f"{name} has hidden size {hidden.shape[1]} but {head_name} expects {head.hidden_size} "
            f"(its weight is {tuple(head.weight.shape)})"
        )
    if hidden.device != head.weight.device:
        raise ValueError(f"{name} is on {hidden.device} but {head_name} is on {head.weight.device}; move one of them")
    if hidden.dtype == head.weight.dtype:
        return
    # Autocast leaves float64 alone.
    if torch.float64 in (hidden.dtype, head.weight.dtype):
        raise TypeError(f"{name} is {hidden.dtype} but {head_name} is {head.weight.dtype}; convert one of them")
    if not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(
            f"{name} is {hidden.dtype} but {head_name} is {head.weight.dtype}; convert one of them, "
            "or run under torch.autocast"
        )


def check_same_precision(name: str, hidden: torch.Tensor, student_hidden: torch.Tensor) -> None:
    """Views may differ in dtype, but statistics are either float32 or float64."""
    if statistics_dtype(hidden.dtype) != statistics_dtype(student_hidden.dtype):
        raise TypeError(
            f"{name} is {hidden.dtype} but student_hidden is {student_hidden.dtype}; float64 goes only with float64, "
            "convert one model's hidden states and head"
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
    if student.shard is None and teacher.shard is None:
        return
    if student.shard is None or teacher.shard is None:
        whole, sliced = ("student_head", name) if student.shard is None else (name, "student_head")
        raise ValueError(
            f"{sliced} is a slice of its vocabulary (vocabulary-parallel) but {whole} is a whole head; give both with "
            "group= and vocab_start=, or neither"
        )
    if not student.shard.is_like(teacher.shard):
        raise ValueError(
            f"student_head and {name} are sliced differently over the ranks: (first column, end) are "
            f"{student.shard.bounds} and {teacher.shard.bounds}, and the groups must have the same ranks too"
        )


def check_target_ids(
    target_ids: torch.Tensor, num_rows: int, num_columns: int, device: torch.device, *, kernel_asserts: bool = False
) -> None:
    """One id a row, each a column. `kernel_asserts`: on an accelerator the kernel that reads the ids sees to the
    latter."""
    _check_tensor("target_ids", target_ids, "[N]")
    if target_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target_ids must be int64 or int32, got {target_ids.dtype}")
    if target_ids.shape != (num_rows,):
        raise ValueError(f"target_ids must have shape [{num_rows}], one id a row, got {tuple(target_ids.shape)}")
    _check_device("target_ids", target_ids, device)
    if num_rows == 0:
        return
    if device.type == "cpu":
        _check_id_values(target_ids, num_columns)
    elif not kernel_asserts:
        assert_ids_async(target_ids, num_columns)


def _check_id_values(target_ids: torch.Tensor, num_columns: int) -> None:
    low, high = int(target_ids.min()), int(target_ids.max())
    if low < 0 or high >= num_columns:
        raise ValueError(
            f"target_ids must lie in [0, {num_columns}), got values from {low} to {high}; drop ignored positions "
            "(-100) before packing, and check that tokenizer and head belong together"
        )


def assert_ids_async(target_ids: torch.Tensor, num_columns: int) -> None:
    """The same without waiting for a device: the error comes with its next operation."""
    inside = (target_ids.clamp(0, num_columns - 1) == target_ids).all()
    torch._assert_async(inside, f"target_ids outside [0, {num_columns})")


def check_cu_seqlens(cu_seqlens: torch.Tensor, num_rows: int, device: torch.device) -> None:
    _check_tensor("cu_seqlens", cu_seqlens, "[B + 1]")
    if cu_seqlens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens must have shape [B + 1], got {tuple(cu_seqlens.shape)}")
    _check_device("cu_seqlens", cu_seqlens, device)
    proper = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == num_rows) & (cu_seqlens.diff() >= 0).all()
    if device.type != "cpu":
        torch._assert_async(proper, f"cu_seqlens must rise from 0 to {num_rows}")
    elif not bool(proper):
        raise ValueError(
            f"cu_seqlens must start at 0, end at the number of rows ({num_rows}) and never fall, "
            f"got {cu_seqlens.tolist() if cu_seqlens.numel() <= 16 else cu_seqlens}"
        )


def check_token_weights(weights: torch.Tensor, num_rows: int, device: torch.device) -> None:
    """[N] floating-point, >= 0, no gradient. NaN and infinity make the loss NaN, as in any other input."""
    _check_tensor("token_weights", weights, "[N]")
    check_operand_dtype("token_weights", weights)
    if weights.shape != (num_rows,):
        raise ValueError(f"token_weights must have shape [{num_rows}], got {tuple(weights.shape)}")
    _check_device("token_weights", weights, device)
    if weights.requires_grad:
        raise ValueError("token_weights must not require a gradient (no gradient flows through weights); detach it")
    negative = (weights < 0).any()
    if device.type != "cpu":
        torch._assert_async(~negative, "token_weights must be >= 0")
    elif bool(negative):
        raise ValueError(f"token_weights must be >= 0, got values down to {float(weights.min()):g}")


def check_total(name: str, total: float | torch.Tensor | None, num_rows: int, device: torch.device) -> None:
    """A finite number > 0, as a Python number or a 0-dim tensor. (0 too where there are no rows to count.)"""
    if total is None:
        return
    low, strict = 0.0, num_rows > 0
    if not isinstance(total, torch.Tensor):
        check_number(name, total, low=low, open_low=strict)
        return
    _check_tensor(name, total, "[]")
    if total.dim() != 0:
        raise ValueError(f"{name} must be a number or a 0-dim tensor, got shape {tuple(total.shape)}")
    if total.dtype == torch.bool or total.is_complex():
        raise TypeError(f"{name} must be an integer or floating-point tensor, got {total.dtype}")
    if total.requires_grad:
        raise ValueError(f"{name} must not require a gradient; detach it")
    if total.device.type == "cpu":
        check_number(name, total.item(), low=low, open_low=strict)
        return
    _check_device(name, total, device)
    proper = torch.isfinite(total) & (total > low if strict else total >= low)
    torch._assert_async(proper, f"{name} must be finite and > 0")


def check_workspace(workspace_bytes: int | None) -> None:
    if workspace_bytes is None:
        return
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int):
        raise TypeError(f"workspace_bytes must be an int or None, got {type(workspace_bytes).__name__}")
    if workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes must be > 0, got {workspace_bytes}")


def check_loss_inputs(inputs: LossInputs, config: LossConfig) -> None:
    """All of `unisd_loss`'s tensors: shapes, dtypes, devices, and on a CPU the values of ids and offsets."""
    check_hidden("student_hidden", inputs.student_hidden, inputs.student_head, "student_head")
    check_head("teacher_head", inputs.teacher_head)
    for name in ("auxiliary_head", "negative_head"):
        if getattr(inputs, name) is not None:
            check_head(name, getattr(inputs, name))
    num_rows, device = inputs.num_rows, inputs.student_hidden.device
    others: list[tuple[str, torch.Tensor, LMHead, str]] = [
        ("teacher_hidden", inputs.teacher_hidden, inputs.teacher_head, "teacher_head")
    ]
    if inputs.negative_hidden is not None:
        head, head_name = inputs.negative_head, "negative_head"
        if head is None:
            head, head_name = inputs.teacher_head, "teacher_head"
        others.append(("negative_hidden", inputs.negative_hidden, head, head_name))
    for k, hidden in enumerate(inputs.auxiliary_hidden):
        head, head_name = inputs.auxiliary_head, "auxiliary_head"
        if head is None:
            head, head_name = inputs.teacher_head, "teacher_head"
        others.append((f"auxiliary_hidden[{k}]", hidden, head, head_name))
    for name, hidden, head, head_name in others:
        check_hidden(name, hidden, head, head_name)
        check_same_rows(name, hidden, num_rows)
        check_same_precision(name, hidden, inputs.student_hidden)
        check_heads_match(inputs.student_head, head, head_name)
        if hidden.device != device:
            raise ValueError(f"{name} is on {hidden.device} but student_hidden is on {device}; move one of them")
    check_target_ids(inputs.target_ids, num_rows, inputs.student_head.num_columns, device)
    check_cu_seqlens(inputs.cu_seqlens, num_rows, device)
    if config.feature_weight > 0 and inputs.student_hidden.shape != inputs.teacher_hidden.shape:
        raise ValueError(
            f"feature matching compares hidden states of one width, got {tuple(inputs.student_hidden.shape)} and "
            f"{tuple(inputs.teacher_hidden.shape)}; set feature_weight=0 for models of different width"
        )
    if inputs.token_weights is not None:
        check_token_weights(inputs.token_weights, num_rows, device)
    check_total("num_items", inputs.num_items, num_rows, device)
    check_total("weight_total", inputs.weight_total, num_rows, device)
    weighs = config.resolved_weight_normalization(bool(inputs.auxiliary_hidden)) == "weighted"
    if inputs.weight_total is not None and not (weighs and config.normalization == "token"):
        raise ValueError(
            "weight_total is the sum of weights that normalization='token' divides by with "
            "weight_normalization='weighted'; leave it out otherwise"
        )
