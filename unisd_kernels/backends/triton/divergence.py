"""Common part of the two designs of a divergence: their gradients, from what they saved of a block."""

from __future__ import annotations

from typing import ClassVar

import torch

from unisd_kernels.backends.triton.gradients import Saved, write_divergence_gradient


class TritonDivergence:
    """Chunks of gradients that are written block by block (`unisd_kernels.backends.base.Divergence`)."""

    # Do the tiles that `forward` saves hold shifted logits (`gradients.divergence_gradient_kernel`)?
    shifted: ClassVar[bool]
    chunk_rows: int
    block_rows: int | None
    _beta: float
    _gradient: torch.Tensor  # [chunk_rows, V]

    def logits(self, rows: slice) -> None:
        """None: logits are made block by block."""

    def backward(
        self,
        saved: Saved,
        target_ids: torch.Tensor | None,
        weight: torch.Tensor | None,
        logprob_weight: torch.Tensor | None,
    ) -> None:
        write_divergence_gradient(saved, self._beta, target_ids, weight, logprob_weight, self.shifted)

    def gradient(self, count: int) -> torch.Tensor:
        return self._gradient[:count]
