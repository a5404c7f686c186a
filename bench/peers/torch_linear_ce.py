"""PyTorch's own `linear_cross_entropy` (torch.nn.functional, from 2.13) for scoring, in chunks of its choice."""

from __future__ import annotations

from functools import partial

import torch

from bench.cases import Case
from bench.peers.step import Step, scoring
from bench.records.failures import NotHere, NotOffered


def build(case: Case, beta: float, device: torch.device) -> Step:
    if case.options["temperature"] != 1.0:
        raise NotOffered("torch's linear_cross_entropy has no temperature")
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        raise NotHere(f"it needs torch 2.13 or newer, this is {torch.__version__}")
    options = torch.nn.LinearCrossEntropyOptions()

    return scoring(partial(torch.nn.functional.linear_cross_entropy, reduction="none", options=options))
