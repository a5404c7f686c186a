"""Inputs and expectations that the peers of one case and divergence share."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from bench.cases import Case
from bench.inputs.sets import make_inputs, more_inputs
from bench.measuring.accuracy import Expected, expected_outcome
from bench.peers import Outcome, Peer
from bench.records.results_file import case_fields
from unisd_kernels.config import LossInputs


@dataclass(frozen=True)
class Setting:
    """A case at one beta. `sets`: inputs to go round; the first one's outcome is `expected`."""

    case: Case
    beta: float
    device: torch.device
    sets: list[LossInputs]
    expected: Expected

    def errors(self, peer: Peer, outcome: Outcome) -> dict[str, float]:
        """Distance of a peer's outcome on the first set from float64, and the distance allowed."""
        errors = self.expected.errors(outcome, peer.mean_only)
        return errors | self.expected.limits_of(errors)


def row_of(case: Case, beta: float, peer: Peer, device: torch.device) -> dict[str, Any]:
    """A row of results before it has figures."""
    about = {"divergence": case.divergence(beta), "peer": peer.name, "note": peer.note, "device_type": device.type}
    return {**case_fields(case), **about}


def make_sets(case: Case, device: torch.device) -> list[LossInputs]:
    """Inputs to go round for a case."""
    return more_inputs(case, make_inputs(case, device), device)


def make_setting(case: Case, beta: float, device: torch.device, sets: list[LossInputs]) -> Setting:
    """Compute what the first of the sets is expected to give."""
    if "torch._dynamo" in sys.modules:
        # Compiled code of other cases would count towards torch.compile's limit of variants.
        torch.compiler.reset()
    expected = expected_outcome(case, sets[0], beta)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what inputs and reference left behind is room for the peers
    return Setting(case, beta, device, sets, expected)
