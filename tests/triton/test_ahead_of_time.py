"""Every kernel compiles for GPUs that are not here, without spilling registers and with their matrix instructions.

In a process of its own: kernels that were imported for the interpreter cannot be compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from unisd_kernels.triton.ahead_of_time import ARCHITECTURES, SHARED_MEMORY


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills_and_matrix_instructions(architecture):
    done = subprocess.run(
        [sys.executable, "-m", "unisd_kernels.triton.ahead_of_time", "--json", "--architectures", architecture],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports = json.loads(done.stdout)
    products = [report for report in reports if report["variant"].startswith(("score", "pair"))]
    assert len(products) >= 12
    for report in reports:
        assert report["spilled"] == 0, report
        assert report["shared"] <= SHARED_MEMORY[architecture], report
        assert report["programs_per_processor"] >= 1, report
    for report in products:
        assert report["matrix_instructions"] > 0, report
        addressed = architecture != "sm_80" and not any(word in report["variant"] for word in ("plain", "float32"))
        assert (report["bulk_copies"] > 0) == addressed, report


def test_the_interpreter_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "unisd_kernels.triton.ahead_of_time"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 1
    assert "unset it" in done.stderr
