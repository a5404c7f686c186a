"""Collective calls that heads in slices and batches on several ranks share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import distributed

if TYPE_CHECKING:  # a torch may be built without it
    from torch.distributed import ProcessGroup


def gathered(values: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """[R, ...] of all ranks in their order, from values of one shape on each: one message."""
    values = values.contiguous()
    out = values.new_empty(group.size(), *values.shape)
    distributed.all_gather(list(out.unbind()), values, group=group)
    return out
