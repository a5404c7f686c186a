"""Batches: rows of ids padded, micro-batches of TRL cropped to what they hold, their completion tokens packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from unisd_kernels import pack_rows

SAMPLER_LOGPROBS = "sampler_logprobs"
"""Key of a batch: [B, T], log-probabilities that the sampler gave the tokens it drew, at its temperature."""
SCORED = "agreement_scored"
"""Key of a batch: [B] bool, on the CPU, which sequences are read under the auxiliary contexts."""
TEACHER_HIDDEN = "teacher_hidden"
"""Key of a batch: [B, T, H], the teacher's hidden states of the completions, made when the window was read."""
AGREEMENT_WEIGHTS = "agreement_weights"
"""Key of a batch: [B, T], made over the window (`unisd.window`)."""
DISAGREEMENT = "agreement_disagreement"
"""Key of a batch: what the weights come from, [B, T] for tokens, [B, 1] for sequences; 0 where none was measured."""
WEIGHT_TOTAL = "weight_total"
"""Key of a batch: [], the sum of the weights of the optimizer step."""
CLIP_CAP = "clip_cap"
"""Key of a batch: [] on the CPU, the cap of the optimizer step; NaN or infinite where its divergences are."""


# Beside the attention mask: tokens that tools wrote, tokens that settings leave out (`unisd.masks`).
_OWN_MASKS = ("tool_mask", "loss_mask")


@dataclass(frozen=True)
class CompletionRows:
    """The N completion tokens of a micro-batch that count, and their places among its [B, T] positions.

    Attributes:
        positions: [N] indices into B * T.
        ids: [N] the sampled tokens.
        cu_seqlens: [B + 1].
    """

    positions: torch.Tensor
    ids: torch.Tensor
    cu_seqlens: torch.Tensor

    @classmethod
    def of(cls, mask: torch.Tensor, completion_ids: torch.Tensor) -> CompletionRows:
        """The rows that `mask` [B, T] keeps of `completion_ids` [B, T]."""
        positions = torch.arange(mask.numel(), device=mask.device).view_as(mask)
        positions, ids, cu_seqlens = pack_rows(mask, positions, completion_ids)
        return cls(positions, ids, cu_seqlens)

    def subset(self, kept: torch.Tensor) -> CompletionRows:
        """The rows at the ascending places `kept` [n], of the same sequences."""
        return CompletionRows(
            self.positions[kept],
            self.ids[kept],
            torch.searchsorted(kept, self.cu_seqlens.to(kept.dtype)).to(self.cu_seqlens.dtype),
        )

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    def to(self, device: torch.device) -> CompletionRows:
        return CompletionRows(self.positions.to(device), self.ids.to(device), self.cu_seqlens.to(device))

    def take(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, T, H] to [N, H], on the device of the rows: a model split over devices may end elsewhere."""
        rows = hidden.flatten(0, 1).index_select(0, self.positions.to(hidden.device))
        return rows.to(self.ids.device)

    def put(self, rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """[N, H] to [B, T, H] = [*shape, H], with zeros at the other positions."""
        hidden = rows.new_zeros(shape.numel(), rows.shape[1]).index_copy(0, self.positions, rows)
        return hidden.view(*shape, -1)


def padded(
    rows: Sequence[Sequence[int]], value: int, side: Literal["left", "right"], multiple: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, L], int64, of B rows of ids.

    Args:
        value: id of the padding.
        side: where it goes.
        multiple: L is a multiple of it.
    """
    longest = max(len(row) for row in rows)
    if multiple is not None:
        longest += -longest % multiple
    ids = torch.full((len(rows), longest), value, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        columns = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[place, columns] = torch.tensor(row, dtype=torch.long)
        mask[place, columns] = 1
    return ids, mask


def counted_mask(batch: dict[str, Any]) -> torch.Tensor:
    """[B, T] mask of the completion tokens that are the model's own and count."""
    mask = batch["completion_mask"]
    for name in _OWN_MASKS:
        if name in batch:
            mask = mask * batch[name]
    return mask


def per_sequence(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a batch whose first dimension is B."""
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and value.dim() > 0}


def micro_batches(window: dict[str, Any], batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """The sequences of a window, so many at a time."""
    for start in range(0, window["completion_ids"].shape[0], batch_size):
        yield {name: value[start : start + batch_size] for name, value in per_sequence(window).items()}


def crop(batch: dict[str, Any]) -> dict[str, Any]:
    """Cut off columns that are padding in every row: a micro-batch is padded to the longest row of the whole
    generation batch."""
    left = [name for name in batch if name.endswith("prompt_mask")]
    lengths = [batch[name].sum(-1).amax() for name in left]
    # One column is kept at least, so that no pass gets an empty completion.
    *kept, completion = torch.stack([*lengths, batch["completion_mask"].sum(-1).amax()]).tolist()
    out = dict(batch)
    for name, length in zip(left, kept, strict=True):
        ids = name.removesuffix("mask") + "ids"
        out[name], out[ids] = batch[name][..., -max(length, 1) :], batch[ids][..., -max(length, 1) :]
    by_place = (*_OWN_MASKS, TEACHER_HIDDEN, AGREEMENT_WEIGHTS, DISAGREEMENT, SAMPLER_LOGPROBS)
    for name in ("completion_ids", "completion_mask", *by_place):
        if name in batch:
            out[name] = batch[name][:, : max(completion, 1)]
    return out
