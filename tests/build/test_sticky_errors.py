"""tests/sticky_errors.py, on a GPU that only says it is lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUITE = """
import pytest, torch

def lost():
    raise RuntimeError("CUDA error: an illegal memory access was encountered\\nmore")

def test_it_loses_the_gpu(monkeypatch):
    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = lost
    lost()

def test_that_did_nothing_wrong():
    pass
"""


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_the_process_ends_and_names_the_test(tmp_path, workers):
    (tmp_path / "test_suite.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-p", "tests.sticky_errors", "-p", "no:cacheprovider", "-q", "-rA"]
    workers_flags = ["-n", str(workers)] if workers else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        [*command, *workers_flags, "-c", os.devnull, "--rootdir", str(tmp_path), str(tmp_path)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    printed = done.stdout + done.stderr
    assert "the GPU is lost for this process since test_suite.py::test_it_loses_the_gpu: CUDA error" in printed
    assert re.search(r"FAILED \S*test_suite.py::test_it_loses_the_gpu\b", printed)
    assert "RuntimeError: CUDA error: an illegal memory access was encountered" in printed
    # Another worker takes over; without one there is no process left to run it in.
    assert bool(re.search(r"PASSED \S*::test_that_did_nothing_wrong\b", printed)) == bool(workers)
    assert done.returncode == 1
