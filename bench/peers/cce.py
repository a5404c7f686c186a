"""Apple's cut-cross-entropy for scoring: the negative log-probability of the target, logits never in memory.

On an accelerator its Triton kernels, on a CPU the compiled implementation that it offers for machines without them.
"""

from __future__ import annotations

from functools import partial

import torch

from bench.cases import Case
from bench.peers.step import Step, scoring
from bench.records.failures import NotOffered


def build(case: Case, beta: float, device: torch.device) -> Step:
    if case.options["temperature"] != 1.0:
        raise NotOffered("cut-cross-entropy has no temperature")
    from cut_cross_entropy import linear_cross_entropy

    impl = "torch_compile" if device.type == "cpu" else "cce"

    return scoring(partial(linear_cross_entropy, reduction="none", impl=impl))
