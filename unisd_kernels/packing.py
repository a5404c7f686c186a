"""Packed (varlen) rows: from padded batches to [N] rows with `cu_seqlens`, and sums over sequences.

`cu_seqlens` [B + 1] holds the offsets of the sequences in the packed rows: sequence b owns rows
`cu_seqlens[b] : cu_seqlens[b + 1]`. It is the convention of flash-attn's varlen functions.
"""

from __future__ import annotations

import torch


def pack_rows(mask: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Keep the valid positions of padded tensors, one row each, and say where each sequence starts.

    Args:
        mask: [B, T], non-zero at the valid positions (completion tokens).
        *tensors: each [B, T] or [B, T, ...]; differentiable.

    Returns:
        the packed tensors, each [N, ...], in the order given, then `cu_seqlens` int32 [B + 1].

    Raises:
        TypeError: something that is not a tensor, or a complex mask.
        ValueError: a tensor whose first two dimensions are not the mask's, or on another device; on a CPU also a NaN in
            the mask.

    Example:
        >>> hidden, ids, cu_seqlens = pack_rows(completion_mask, hidden_states, completion_ids)
    """
    for name, value in (("mask", mask), *((f"tensor {i}", tensor) for i, tensor in enumerate(tensors))):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if mask.is_complex():
        raise TypeError(f"mask must be a bool, integer or floating-point tensor, got {mask.dtype}")
    if mask.dim() != 2:
        raise ValueError(f"mask must have shape [B, T], got {tuple(mask.shape)}")
    for position, tensor in enumerate(tensors):
        if tensor.shape[:2] != mask.shape:
            raise ValueError(
                f"tensor {position} has shape {tuple(tensor.shape)}; its first two dimensions must be those of the "
                f"mask, {tuple(mask.shape)}"
            )
        if tensor.device != mask.device:
            raise ValueError(f"tensor {position} is on {tensor.device} but mask is on {mask.device}; move one of them")
    if mask.is_floating_point() and mask.device.type == "cpu" and bool(mask.isnan().any()):
        raise ValueError("mask contains NaN: whether these positions are valid is not known")
    valid = mask != 0
    lengths = valid.sum(dim=1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    # One `nonzero` (a synchronization on CUDA) serves every tensor.
    rows = valid.reshape(-1).nonzero().squeeze(1)
    packed = tuple(tensor.flatten(0, 1).index_select(0, rows) for tensor in tensors)
    return (*packed, cu_seqlens)


def sequence_lengths(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """[B] int64 number of rows of each sequence."""
    return cu_seqlens.long().diff()


def sequence_ids(cu_seqlens: torch.Tensor, num_rows: int) -> torch.Tensor:
    """[N] int64: the sequence each row belongs to. `num_rows` (known from a shape) avoids a device synchronization."""
    lengths = sequence_lengths(cu_seqlens)
    return torch.repeat_interleave(
        torch.arange(lengths.numel(), device=cu_seqlens.device), lengths, output_size=num_rows
    )


@torch.no_grad()
def sequence_sums(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Sum [..., N] over the rows of each sequence, giving [..., B]; an empty sequence sums to 0. No gradient.

    One sequence's rows are added up in one order, in float64: the same bits at every call also on a GPU (where
    `index_add` adds in the order of arrival), and for float32 the sum itself but for its last rounding.
    """
    wide = values.to(torch.float64).movedim(-1, 0).contiguous()
    # Without its own check of the offsets, which would wait for a GPU.
    sums = torch.segment_reduce(wide, "sum", offsets=cu_seqlens.long().contiguous(), axis=0, unsafe=True, initial=0)
    return sums.movedim(0, -1).to(values.dtype)
