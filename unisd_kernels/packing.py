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
        ValueError: a tensor whose first two dimensions are not the mask's.

    Example:
        >>> hidden, ids, cu_seqlens = pack_rows(completion_mask, hidden_states, completion_ids)
    """
    if mask.dim() != 2:
        raise ValueError(f"mask must have shape [B, T], got {tuple(mask.shape)}")
    for position, tensor in enumerate(tensors):
        if tensor.shape[:2] != mask.shape:
            raise ValueError(
                f"tensor {position} has shape {tuple(tensor.shape)}; its first two dimensions must be those of the "
                f"mask, {tuple(mask.shape)}"
            )
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


def sequence_sums(values: torch.Tensor, ids: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """Sum [..., N] over the rows of each sequence, giving [..., B]; an empty sequence sums to 0."""
    sums = values.new_zeros((*values.shape[:-1], num_sequences))
    return sums.index_add(-1, ids, values)
