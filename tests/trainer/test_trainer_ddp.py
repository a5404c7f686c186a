"""Two processes give the weights and metrics that one process gives with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainer import ddp_worker

ROOT = Path(__file__).parents[2]


def two_processes(folder: Path) -> dict:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, "-m", "tests.trainer.ddp_worker", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / ddp_worker.RESULT)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    ddp_worker.main(str(tmp_path))
    one = torch.load(tmp_path / ddp_worker.RESULT)
    two = two_processes(tmp_path)
    for name, expected in one.items():
        for weight, value in expected["weights"].items():
            assert torch.allclose(two[name]["weights"][weight], value, rtol=0, atol=2e-6), (name, weight)
        assert two[name]["divergence"] == pytest.approx(expected["divergence"], rel=1e-5)
        assert two[name]["drift"] == pytest.approx(expected["drift"], rel=1e-4, abs=1e-7)
