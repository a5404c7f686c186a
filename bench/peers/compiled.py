"""torch.compile of the dense formulas (`dense.py`): everything of the vocabulary's size in one graph, without a break.

The reductions of [N] numbers stay outside it: they depend on the lengths of the sequences. Compilation happens in
the first call, which is never timed; its failure is the contender's.
"""

from __future__ import annotations

import torch

from bench.cases import Inputs
from bench.peers import dense
from bench.peers.step import Step

BACKEND = "inductor"


def build(inputs: Inputs, beta: float) -> Step:
    torch.compiler.reset()
    return dense.build_from(
        inputs, beta, lambda function: torch.compile(function, fullgraph=True, dynamic=False, backend=BACKEND)
    )
