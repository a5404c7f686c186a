"""The peers by name: this package, the floor and others; each makes a step of a case and a beta."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from bench.cases import Case, Operation
from bench.peers import (
    captured,
    cce,
    compiled,
    dense,
    fma_peak,
    gemm_floor,
    liger_chunked,
    liger_kl,
    liger_scaled,
    liger_triton,
    orda,
    torch_linear_ce,
    trl_kernels,
    unisd,
)
from bench.peers.names import FLOOR, FLOOR_FLOAT32, FLOORS, OURS, PEAK
from bench.peers.step import Outcome, Step
from bench.records.failures import NotHere, NotOffered

__all__ = [
    "ALL",
    "FLOOR",
    "FLOORS",
    "FLOOR_FLOAT32",
    "OURS",
    "PEAK",
    "PEERS",
    "NotHere",
    "NotOffered",
    "Outcome",
    "Peer",
    "Step",
    "names",
]

ALL: tuple[Operation, ...] = ("unisd_loss", "divergence", "scoring")


@dataclass(frozen=True)
class Peer:
    """An implementation that is measured.

    Attributes:
        name: in tables.
        make: makes the step from a case, a beta and a device; may raise with the reason it cannot, as may the step.
        note: what it cannot do, or does more; shown beside its row.
        operations: those it has.
        mean_only: its value is the mean of D over the rows, its gradient that of the mean.
        variant: another implementation of this package, shown beside its default.
        compiles: in its first call, whose memory is then not the step's.
        fits: the cases it is of any use for.
    """

    name: str
    make: Callable[[Case, float, torch.device], Step]
    note: str = ""
    operations: tuple[Operation, ...] = ALL
    mean_only: bool = False
    variant: bool = False
    compiles: bool = False
    fits: Callable[[Case], bool] = lambda case: True

    def build(self, case: Case, beta: float, device: torch.device) -> Step:
        if case.operation not in self.operations:
            raise NotOffered(f"{self.name} has {' and '.join(self.operations)} only")
        return self.make(case, beta, device)


BF16 = torch.bfloat16
COMPILE_NOTE = "torch.compile; compile time not counted"
PEERS = {
    peer.name: peer
    for peer in (
        Peer(FLOOR, gemm_floor.build, "bare matrix products into a preallocated [N, V]"),
        Peer(OURS, unisd.build),
        Peer("dense float32", dense.build, "every logits tensor kept for autograd"),
        Peer("dense bfloat16", partial(dense.build, dtype=BF16), "log-softmax in bfloat16, as the paper's code"),
        Peer("dense float32 compiled", compiled.build, COMPILE_NOTE, compiles=True),
        Peer("dense bfloat16 compiled", partial(compiled.build, dtype=BF16), COMPILE_NOTE, compiles=True),
        Peer("trl composed", trl_kernels.build, "ChunkedDivergenceFunction + ChunkedLogProbFunction"),
        Peer("unisd fused", partial(unisd.build, impl="triton_fused"), "impl='triton_fused'", variant=True),
        Peer("unisd chunked", partial(unisd.build, impl="triton_chunked"), "impl='triton_chunked'", variant=True),
        Peer(
            "unisd captured",
            captured.build,
            "in a CUDA graph; its capture not counted",
            variant=True,
            compiles=True,
            fits=lambda case: case.on_accelerator and case.num_rows <= captured.MOST_ROWS,
        ),
        Peer("unisd torch", partial(unisd.build, impl="torch"), "impl='torch'", variant=True),
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
            compiles=True,
        ),
        Peer(
            "liger kl",
            liger_kl.build,
            "LigerFusedLinearKLDivFunction: scalar mean of D, no per-token weights, forward KL only; "
            "teacher as float32 probabilities [N, V]",
            ("divergence",),
            mean_only=True,
        ),
        Peer(
            "orda",
            orda.build,
            "distillation_loss, tied teacher: scalar mean of D, no per-token weights",
            ("divergence",),
            mean_only=True,
        ),
        Peer("cut-cross-entropy", cce.build, "no temperature, no entropy", ("scoring",), compiles=True),
        Peer("liger scaled", liger_scaled.build, "LigerFusedLinearScaledCrossEntropyFunction", ("scoring",)),
        Peer("torch linear_ce", torch_linear_ce.build, "F.linear_cross_entropy, chunked", ("scoring",)),
        Peer(
            FLOOR_FLOAT32,
            gemm_floor.build_float32,
            "the floor of float32 operands",
            fits=lambda case: not case.on_accelerator and case.dtype != torch.float32,
        ),
        Peer(
            PEAK,
            fma_peak.build,
            "as many multiply-adds on registers alone",
            fits=lambda case: not case.on_accelerator,
        ),
    )
}


def names(asked: list[str], case: Case) -> list[str]:
    """Peers that `--peers` means, floors first: "all" leaves out this package's variants on a CPU.

    Raises:
        ValueError: a name that is not known.
    """
    unknown = sorted(set(asked) - {"all", *PEERS})
    if unknown:
        raise ValueError(f"--peers: unknown {', '.join(unknown)}; there are all, {', '.join(PEERS)}")
    if "all" in asked:
        asked = [name for name, peer in PEERS.items() if peer.fits(case) and (case.on_accelerator or not peer.variant)]
    floors = [name for name in FLOORS if name in asked or name == FLOOR]
    return [*floors, *(name for name in asked if name not in FLOORS)]
