"""The second floor: as many multiply-adds as the floor's products, on registers alone (`roofline/fma_peak.py`)."""

from __future__ import annotations

import torch

from bench.cases import Case
from bench.peers.step import Outcome, Step
from bench.roofline import fma_peak
from unisd_kernels.config import LossInputs


def build(case: Case, beta: float, device: torch.device) -> Step:
    loop = fma_peak.loop(case.dtype)

    def step(inputs: LossInputs) -> Outcome:
        loop.run(case.flops, torch.get_num_threads())
        return Outcome(None, None)

    return step
