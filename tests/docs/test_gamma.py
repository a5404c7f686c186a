"""What docs/training.md says of gamma is what the kernels do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from unisd.presets import PRESETS
from unisd_kernels import agreement_weights

TEXT = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
ROWS = re.findall(r"^\| ([0-9.]+) \| ([0-9.]+) \| ([0-9.]+) \| `(\w+)` \|$", TEXT, re.MULTILINE)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_least_weight_and_that_at_the_quantile(row):
    gamma, least, at_quantile, preset = float(row[0]), float(row[1]), float(row[2]), row[3]
    assert PRESETS[preset].agreement_gamma == gamma
    spread = torch.ones(1000)
    spread[:40] = 50.0  # beyond ten times the 0.95 quantile, which is 1
    scores = torch.stack([spread.sqrt(), -spread.sqrt()])  # variance: the spread
    result = agreement_weights(scores, torch.tensor([0, 1000]), level="token", statistic="variance", gamma=gamma)
    assert result.weights.min().item() == pytest.approx(least, abs=5e-4)
    assert result.weights.max().item() == pytest.approx(at_quantile, abs=5e-4)


def test_the_table_is_there():
    assert len(ROWS) == 3
