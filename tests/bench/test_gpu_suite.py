"""The script of one call on a GPU, with a python3 that only notes what it is asked for."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The cases leave a file behind, as they do. HANG names a part whose first process is lost to a peer.
PYTHON = """#!/bin/sh
echo "${TRITON_INTERPRET-unset} $*" >>"$CALLS"
case "$*" in
    *"pytest"*"tests/triton"*) exec $KERNEL_TESTS ;;
    *"csrc/nvcc.py"*) exit ${NVCC_STATUS:-0} ;;
    *"import xdist"* | *"import pytest_timeout"*) exit $NO_XDIST ;;
    *"bench suite --suite ${HANG:-none} "*)
        echo "{}" >"$OUT/bench.json"
        [ -e "$OUT/../hung" ] && rm -f "$OUT/bench.json.in_flight" && exit 0
        touch "$OUT/../hung" "$OUT/bench.json.in_flight"
        exit 139 ;;
    *"bench suite"*) echo "{}" >"$OUT/bench.json" ;;
esac
"""


def rehearse(tmp_path, *arguments, device="cuda", no_xdist=1, kernel_tests="true", cases="gpu", **more):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("python3", "nvcc", "g++"):
        program = folder / name
        program.write_text(PYTHON)
        program.chmod(0o755)
    environment = {
        "PATH": f"{folder}:/usr/bin:/bin",
        "OUT": str(tmp_path / "out"),
        "CALLS": str(tmp_path / "calls"),
        "NO_XDIST": str(no_xdist),
        "KERNEL_TESTS": kernel_tests,
        "DEVICE": device,
        "CASES": cases,
        "TRITON_INTERPRET": "1",
        "WHEELS": str(tmp_path / "no wheels"),
        **more,
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


def step(call: str) -> str | None:
    """Which step of the script a call belongs to."""
    for name, mark in (
        ("doctor", "doctor"),
        ("ceilings", "bench ceilings"),
        ("kernels", "bench kernels --device"),
        ("tiles", "bench tuning --device"),
        ("steps", "bench steps --device"),
        ("products", "bench products"),
        ("rollouts", "bench rollouts"),
        ("tests", "-m pytest"),
    ):
        if mark in call:
            return name
    if "bench suite" in call:
        return call.split("--suite ")[1].split()[0]
    return None


def test_the_most_valuable_comes_first(tmp_path):
    done, calls = rehearse(tmp_path)
    assert done.returncode == 0, done.stdout
    # No kernel under the interpreter.
    assert {call.split()[0] for call in calls} == {"unset"}
    order = [name for name in map(step, calls) if name]
    assert order == [
        *("doctor", "ceilings", "headline", "kernels", "tests", "peers", "tests", "steps", "heads", "products"),
        *("rollouts", "rows", "compiled"),
    ]
    of_tests = [call for call in calls if "-m pytest" in call]
    assert [call.split()[-1] for call in of_tests] == ["tests/gpu", "tests/triton"]
    assert "pytest-xdist is absent" in done.stdout
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_tests_that_take_too_long_are_named_and_fail_the_run(tmp_path):
    """They are cut off at the reserve of the tables."""
    done, _ = rehearse(tmp_path, "--deadline", "13", kernel_tests="sleep 60")
    assert done.returncode == 1
    assert "FAILED: tests: tests/triton was cut off" in done.stdout
    assert "FAILED: tests: tests/gpu" not in done.stdout


@pytest.mark.parametrize("deadline", ["520", "5"])
def test_a_rehearsal_on_a_cpu_leaves_the_kernels_out(tmp_path, deadline):
    done, calls = rehearse(tmp_path, "--deadline", deadline, device="cpu", no_xdist=0, cases="smoke")
    assert any(call.startswith("1 ") for call in calls)
    assert not any("tests/triton" in call for call in calls)
    assert len(list((tmp_path / "out").iterdir())) <= 8
    if deadline == "520":
        assert done.returncode == 0, done.stdout
        assert any(" -n " in call and "-m pytest" in call and "--timeout 60" in call for call in calls)
        assert any("bench tuning --dry-run" in call for call in calls)
    else:
        # Less than the reserve of the tables: no test is begun, which is no success.
        assert done.returncode == 1
        assert "FAILED: tests: tests/gpu was cut off" in done.stdout
        assert not any("pytest -" in call for call in calls)


def test_parts_that_are_named_run_alone_and_in_that_order(tmp_path):
    done, calls = rehearse(tmp_path, "--parts", "kernels:20 headline triton_tests")
    steps = [name for name in map(step, calls) if name]
    assert list(dict.fromkeys(steps)) == ["doctor", "kernels", "headline", "tests"]
    assert not any("tests/gpu" in call for call in calls)
    assert done.returncode == 0, done.stdout
    refused = subprocess.run(
        ["bash", "scripts/gpu_suite.sh", "--parts", "kernel"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "there is no part kernel" in refused.stderr


@pytest.mark.parametrize(("deadline", "measured"), [("80", True), ("28", False)])
def test_tiles_are_measured_where_time_is_left(tmp_path, deadline, measured):
    done, calls = rehearse(tmp_path, "--deadline", deadline, "--parts", "tiles")
    assert len([call for call in calls if "bench tuning --device cuda" in call]) == measured
    assert ("skipped: " in done.stdout) != measured


def test_a_failed_build_is_a_failure_and_the_rest_goes_on(tmp_path):
    done, calls = rehearse(tmp_path, NVCC_STATUS="3")
    assert done.returncode == 1
    assert "FAILED: build of the compiled libraries" in done.stdout
    assert "the CUDA library was not built" in done.stdout
    assert any("--suite headline" in call for call in calls)


def test_a_peer_that_takes_the_process_with_it_is_passed_by(tmp_path):
    done, calls = rehearse(tmp_path, HANG="peers")
    assert done.returncode == 0, done.stdout
    assert "attempt 1: " in done.stdout
    assert [step(call) for call in calls if "bench suite" in call] == [
        *("headline", "peers", "peers", "heads", "rows", "compiled")
    ]
    assert not list((tmp_path / "out").glob("*.in_flight"))
