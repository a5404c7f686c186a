"""Contenders by name. Each makes, from a case's inputs and a beta, a function that runs the operation once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from bench.cases import Inputs, Operation
from bench.peers import cce, compiled, dense, gemm_floor, liger_chunked, liger_triton, trl_kernels, unisd
from bench.peers.step import Outcome, Step

__all__ = ["ALL", "DEFAULT_PEERS", "FLOOR", "OURS", "PEERS", "NotOffered", "Outcome", "Peer", "Step"]

FLOOR, OURS = "gemm floor", "unisd_kernels"
ALL: tuple[Operation, ...] = ("unisd_loss", "divergence", "scoring")


class NotOffered(Exception):
    """The contender does not have the operation."""


@dataclass(frozen=True)
class Peer:
    """Attributes:
    name: in tables.
    make: makes the step; may raise with the reason it cannot run here, as may the step.
    note: what it cannot do, or does more; shown beside its row.
    operations: those it has.
    mean_only: its value is the mean of D over the rows, its gradient that of the mean.
    """

    name: str
    make: Callable[[Inputs, float], Step]
    note: str = ""
    operations: tuple[Operation, ...] = ALL
    mean_only: bool = False

    def build(self, inputs: Inputs, beta: float) -> Step:
        if inputs.case.operation not in self.operations:
            raise NotOffered(f"{self.name} has {' and '.join(self.operations)}, not {inputs.case.operation}")
        return self.make(inputs, beta)


PEERS = {
    peer.name: peer
    for peer in (
        Peer(FLOOR, gemm_floor.build, "bare matrix products into a preallocated [N, V]"),
        Peer(OURS, unisd.build),
        Peer("dense float32", dense.build, "every logits tensor kept for autograd"),
        Peer("trl composed", trl_kernels.build, "ChunkedDivergenceFunction + ChunkedLogProbFunction"),
        Peer("unisd fused", partial(unisd.build, impl="triton_fused"), "impl='triton_fused'"),
        Peer("unisd chunked", partial(unisd.build, impl="triton_chunked"), "impl='triton_chunked'"),
        Peer("unisd torch", partial(unisd.build, impl="torch"), "impl='torch'"),
        Peer("dense compiled", compiled.build, "torch.compile of dense float32; compile time not counted"),
        Peer(
            "liger triton",
            liger_triton.build,
            "LigerFusedLinearJSDFunction: scalar mean of D, no per-token weights",
            ("divergence",),
            mean_only=True,
        ),
        Peer(
            "liger chunked",
            liger_chunked.build,
            "LigerFusedLinearJSDLoss: scalar mean of D, no per-token weights; always makes dW; 16-bit log-softmax",
            ("divergence",),
            mean_only=True,
        ),
        Peer("cut-cross-entropy", cce.build, "no temperature, no entropy", ("scoring",)),
    )
}
# What a table on a CPU holds unless told otherwise.
DEFAULT_PEERS = (FLOOR, OURS, "dense float32", "trl composed")
