"""Contenders by name. Each makes, from a case's inputs and a beta, a function that runs forward and backward once
and returns (loss, gradient of the student's hidden states)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.cases import Inputs
from bench.peers import dense, gemm_floor, trl_kernels, unisd

Step = Callable[[], tuple[torch.Tensor | None, torch.Tensor | None]]


@dataclass(frozen=True)
class Peer:
    """Attributes:
    name: in tables.
    build: makes the step; may raise ImportError with the reason it cannot run here.
    note: what it cannot do, shown beside its row.
    """

    name: str
    build: Callable[[Inputs, float], Step]
    note: str = ""


PEERS = {
    peer.name: peer
    for peer in (
        Peer("gemm floor", gemm_floor.build, "bare matrix products into a preallocated [N, V]"),
        Peer("unisd_kernels", unisd.build),
        Peer("dense float32", dense.build, "every logits tensor kept for autograd"),
        Peer("trl composed", trl_kernels.build, "ChunkedDivergenceFunction + ChunkedLogProbFunction"),
    )
}
