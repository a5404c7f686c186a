"""Two processes give the weights and metrics that one process gives with the whole batch."""

import math
from pathlib import Path

import pytest
import torch

from tests.processes import run_module
from tests.trainer import ddp_worker, tiny_run


def two_processes(folder: Path) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    run_module("tests.trainer.ddp_worker", folder, timeout=1200, **environment)


@tiny_run.with_the_newest_trl
def test_two_processes(tmp_path):
    ddp_worker.main(str(tmp_path))
    one = torch.load(tmp_path / ddp_worker.RESULT)
    two_processes(tmp_path)
    check_that_they_equal_one(one, tmp_path)
    check_that_both_skip_or_stop_when_one_meets_a_nan(tmp_path)


def check_that_they_equal_one(one, tmp_path):
    two = torch.load(tmp_path / ddp_worker.RESULT)
    for name, expected in one.items():
        for weight, value in expected["weights"].items():
            assert torch.allclose(two[name]["weights"][weight], value, rtol=0, atol=2e-6), (name, weight)
        assert two[name]["divergence"] == pytest.approx(expected["divergence"], rel=1e-5)
        assert two[name]["num_tokens"].sum() == expected["num_tokens"].sum()
        assert two[name]["drift"] == pytest.approx(expected["drift"], rel=1e-4, abs=1e-7)

    # One of the processes had no token in a step.
    assert not two["masked"]["num_tokens"].view(2, 2, 2).sum(2).all()


def check_that_both_skip_or_stop_when_one_meets_a_nan(tmp_path):
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert "another process met a value that is not finite" in first["error"]
    assert "not finite are the hidden states of: the teacher" in second["error"]
    assert [math.isnan(loss) for loss in first["losses"]] == [False, True, False]
    assert all(torch.equal(one, other) for one, other in zip(first["weights"], second["weights"], strict=True))
    assert all(weight.isfinite().all() for weight in first["weights"])
    names = {path.name for path in (tmp_path / "nonfinite").iterdir()}
    assert names == {"step-2-process-1.pt"}
