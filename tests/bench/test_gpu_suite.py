"""The script of one call on a GPU, with a python3 that only notes what it is asked for."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The cases leave a file behind, as they do.
PYTHON = """#!/bin/sh
echo "${TRITON_INTERPRET-unset} $*" >>"$CALLS"
case "$*" in
    *"pytest"*"tests/triton"*) exec $KERNEL_TESTS ;;
    *"import xdist"*) exit $NO_XDIST ;;
    *"bench.suite"*) echo "{}" >"$OUT/bench.json" ;;
esac
"""


def rehearse(tmp_path, *arguments, device="cuda", no_xdist=1, kernel_tests="sleep 60"):
    folder = tmp_path / "bin"
    folder.mkdir()
    python = folder / "python3"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {
        "PATH": f"{folder}:/usr/bin:/bin",
        "OUT": str(tmp_path / "out"),
        "CALLS": str(tmp_path / "calls"),
        "NO_XDIST": str(no_xdist),
        "KERNEL_TESTS": kernel_tests,
        "DEVICE": device,
        "TRITON_INTERPRET": "1",
    }
    done = subprocess.run(
        ["bash", "scripts/gpu_suite.sh", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=60,
    )
    return done, (tmp_path / "calls").read_text().splitlines()


def test_tests_that_take_too_long_are_named_and_fail_the_run(tmp_path):
    """Three seconds before the reserve of the cases."""
    done, calls = rehearse(tmp_path, "--deadline", "63")
    assert done.returncode == 1
    assert "FAILED: tests: tests/triton was cut off after" in done.stdout
    assert "tests/gpu was" not in done.stdout
    assert "pytest-xdist is absent" in done.stdout
    # No kernel under the interpreter, and the cases come even so.
    assert {call.split()[0] for call in calls} == {"unset"}
    of_tests = [call for call in calls if "-m pytest" in call]
    assert [call.split()[-1] for call in of_tests] == ["tests/gpu", "tests/triton"]
    assert any("bench.suite" in call for call in calls)


@pytest.mark.parametrize("deadline", ["520", "40"])
def test_a_rehearsal_on_a_cpu_leaves_the_kernels_out(tmp_path, deadline):
    done, calls = rehearse(tmp_path, "--deadline", deadline, device="cpu", no_xdist=0)
    assert any(call.startswith("1 ") for call in calls)
    assert not any("tests/triton" in call for call in calls)
    assert "tests/triton: not on a CPU" in done.stdout
    assert len(list((tmp_path / "out").iterdir())) <= 8
    if deadline == "520":
        assert done.returncode == 0, done.stdout
        assert any("pytest -n " in call for call in calls)
        assert any("bench.tuning --dry-run" in call for call in calls)
    else:
        # Less than the reserve of the cases: no test is begun, which is no success.
        assert done.returncode == 1
        assert "tests/gpu was" in done.stdout
        assert not any("pytest -" in call for call in calls)


@pytest.mark.parametrize(("deadline", "measured"), [("80", True), ("28", False)])
def test_tiles_are_measured_where_time_is_left(tmp_path, deadline, measured):
    """The cases end at once here, and leave all but the ten seconds of the tables."""
    done, calls = rehearse(tmp_path, "--deadline", deadline, kernel_tests="true")
    assert len([call for call in calls if "bench.tuning --device cuda" in call]) == measured
    assert ("skipped: " in done.stdout) != measured
    # With less than a minute no test is begun, which is no success.
    assert done.returncode == int(not measured), done.stdout
