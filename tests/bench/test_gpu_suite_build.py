"""scripts/gpu_suite.sh where a library cannot be built: a failure, not a row of skipped tests."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_failed_build_fails_the_run(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in (("nvcc", "exit 0"), ("python3", 'case "$*" in *csrc/nvcc.py*) exit 1 ;; esac')):
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "OUT": str(tmp_path / "out"), "DEVICE": "cuda"}
    command = ["bash", "scripts/gpu_suite.sh", "--deadline", "80"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment, timeout=60)
    assert done.returncode == 1, done.stdout
    assert "FAILED: the CUDA library was not built" in done.stdout
    assert "the CPU library" not in done.stdout
