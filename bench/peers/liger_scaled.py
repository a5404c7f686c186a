"""Liger's `LigerFusedLinearScaledCrossEntropyFunction` (liger_kernel.ops, from 0.8.5) for scoring.

Per-token negative log-probabilities at a temperature. On Hopper a CuTe kernel that keeps the logits out of memory, if
its packages are installed; elsewhere, and on a CPU, products of 512 rows by PyTorch.
"""

from __future__ import annotations

import torch

from bench.cases import Case
from bench.peers.step import Step, scoring
from bench.records.failures import NotHere


def build(case: Case, beta: float, device: torch.device) -> Step:
    try:
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction
    except ImportError as error:
        raise NotHere("it needs liger-kernel 0.8.5 or newer") from error

    temperature = case.options["temperature"]
    return scoring(lambda *operands: LigerFusedLinearScaledCrossEntropyFunction.apply(*operands, temperature))
