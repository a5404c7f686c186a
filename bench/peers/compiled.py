"""torch.compile of the dense formulas (`dense.py`): everything of the vocabulary's size in one graph, without a break.

The reductions of [N] numbers stay outside it: they depend on the lengths of the sequences. Compilation happens in
the first call, which is never timed; its failure is the peer's.
"""

from __future__ import annotations

import torch

from bench.cases import Case
from bench.peers import dense
from bench.peers.step import Step

BACKEND = "inductor"


def build(case: Case, beta: float, device: torch.device, dtype: torch.dtype = torch.float32) -> Step:
    return dense.build_from(
        case, beta, dtype, lambda function: torch.compile(function, fullgraph=True, dynamic=False, backend=BACKEND)
    )
