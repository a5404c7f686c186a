"""The two front ends of the benchmarks: `pytest bench/`, and `unisd bench` from any directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from itertools import groupby
from pathlib import Path

import pytest

from unisd.cli import bench as command
from unisd.cli import main

ROOT = Path(__file__).parents[2]
OURS, FLOOR = "unisd_kernels", "gemm floor"
# Peers that fail in every way that there is, and this package with a wrong gradient. Loaded with `-p`.
PLUGIN = """
from dataclasses import replace

import torch


def failing(error):
    def make(case, beta, device):
        raise error
    return make


def pytest_sessionstart():
    from bench.peers import OURS, PEERS, NotHere

    make = PEERS[OURS].make

    def wrong(case, beta, device):
        step = make(case, beta, device)
        return lambda inputs: step(inputs)._replace(gradient=step(inputs).gradient * 1.001)

    makes = {
        OURS: wrong,
        "liger triton": failing(NotHere("needs a GPU")),
        "liger kl": failing(ImportError("No module named 'liger_kernel'")),
        "orda": failing(torch.OutOfMemoryError("much text")),
        "trl composed": failing(RuntimeError("broken")),
    }
    for name, make_step in makes.items():
        PEERS[name] = replace(PEERS[name], make=make_step)
"""


def run_pytest(*arguments: str, plugins: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(plugins or "")}
    options = [*(["-p", "broken_peers"] if plugins else []), "-p", "no:xdist", "-rsf", "--bench-device", "cpu"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "bench/", *options, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def test_pytest_has_an_entry_for_each_peer(tmp_path):
    pytest.importorskip("pytest_benchmark")
    output = tmp_path / "result.json"
    cases, peers = ["smoke.kl", "smoke.scoring", "smoke"], [OURS, "dense float32", "liger triton"]
    options = ["--benchmark-only", "--benchmark-json", str(output), "--benchmark-min-rounds", "3"]
    done = run_pytest(*options, "--bench-case", *cases, "--bench-peers", *peers)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "liger triton: not offered: liger triton has divergence only" in done.stdout
    result = json.loads(output.read_text())
    # In the order in which they ran: a group at a time.
    groups = {
        name: [row["extra_info"] for row in rows] for name, rows in groupby(result["benchmarks"], lambda b: b["group"])
    }
    assert list(groups) == ["smoke.kl, forward KL", "smoke.scoring", "smoke, forward KL", "smoke, JSD beta=0.5"]
    for name, rows in groups.items():
        assert [row["peer"] for row in rows] == [FLOOR, OURS, "dense float32"]
        assert f"benchmark '{name}': 3 tests" in done.stdout
        errors = {"value_error"} if name == "smoke.scoring" else {"gradient_error"}
        errors |= {"value_error"} if name.startswith("smoke.kl") else set()
        for row in rows:
            assert {field for field in row if field.endswith("_error")} == (set() if row["peer"] == FLOOR else errors)
            assert all(row[field] <= row[f"{field}_limit"] for field in errors if row["peer"] != FLOOR)
            assert (row["num_rows"], row["vocab_size"], row["dtype"], row["device"]) == (32, 500, "float32", "cpu")
    assert all(row["stats"]["rounds"] == 3 for row in result["benchmarks"])
    assert result["machine_info"]["unisd"]["versions"]["torch"]


def test_pytest_fails_for_a_wrong_kernel_and_says_why_others_are_skipped(tmp_path):
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "broken_peers.py").write_text(PLUGIN)
    peers = [OURS, "liger triton", "liger kl", "orda", "trl composed"]
    # Without --benchmark-only, and with its tables and rounds off.
    options = ["--benchmark-disable", "--bench-case", "smoke.kl", "--bench-peers", *peers]
    done = run_pytest(*options, plugins=tmp_path)
    assert done.returncode == 1
    assert "AssertionError: unisd_kernels: gradient error 1.0e-03, at most 1." in done.stdout
    assert "liger triton: not on this machine: needs a GPU" in done.stdout
    assert "liger kl: not installed: No module named 'liger_kernel'" in done.stdout
    assert "orda: out of memory\n" in done.stdout
    assert "RuntimeError: broken" in done.stdout
    assert "2 failed, 1 passed, 3 skipped" in done.stdout


def test_pytest_refuses_an_unknown_case():
    done = run_pytest("--bench-case", "smoke.nothing")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "no case 'smoke.nothing'; there are kl, " in done.stderr


def test_the_command_runs_in_another_directory(tmp_path):
    """Where a foreign `bench` lies."""
    (tmp_path / "bench.py").write_text("raise RuntimeError('a foreign module')\n")
    script = "import sys; from unisd.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["--case", "smoke.kl", "--device", "cpu", "--rounds", "2", "--peers", OURS, "--output", "x.json"]
    done = subprocess.run(
        [sys.executable, "-c", script, "bench", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["peer"] for row in rows] == [FLOOR, OURS]
    assert all(len(row["samples_seconds"]) == 2 for row in rows)


@pytest.fixture
def _same_path(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.usefixtures("_same_path")
def test_an_unknown_case_is_an_error_that_names_the_cases(capsys):
    assert main(["bench", "--case", "smoke.nothing", "--device", "cpu"]) == 2
    message = capsys.readouterr().err
    assert "no case 'smoke.nothing'" in message
    assert "unisd_star_cpu" in message


@pytest.mark.parametrize("foreign", [False, True])
def test_without_the_repository_it_says_where_the_benchmarks_are(foreign, monkeypatch, capsys, tmp_path):
    """Nothing beside the package, or something else of that name."""
    if foreign:
        (tmp_path / "bench").mkdir()
        for name in ("__init__.py", "__main__.py"):
            (tmp_path / "bench" / name).touch()
    monkeypatch.setattr(command, "ROOT", tmp_path)
    assert main(["bench", "--case", "smoke"]) == 2
    message = capsys.readouterr().err
    assert f"no benchmarks in {tmp_path}: they are in the repository" in message
    assert 'pip install -e ".[bench,peers]"' in message


@pytest.mark.parametrize("file", ["/elsewhere/bench/__init__.py", None])
def test_a_foreign_module_is_refused(file, monkeypatch, capsys):
    module = types.ModuleType("bench")
    module.__file__ = file
    monkeypatch.setitem(sys.modules, "bench", module)
    assert main(["bench", "--case", "smoke"]) == 2
    assert "another module named bench is imported" in capsys.readouterr().err


@pytest.mark.usefixtures("_same_path")
def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["bench", "--case", "smoke.kl", "--device", "cpu", "--rounds", "1", "--peers", OURS]) == 2
    message = capsys.readouterr().err
    assert "tqdm is not installed" in message
    assert 'pip install ".[bench,peers]"' in message


@pytest.mark.usefixtures("_same_path")
def test_a_missing_module_of_the_repository_is_no_missing_package(monkeypatch):
    import bench.__main__  # noqa: F401

    monkeypatch.setitem(sys.modules, "bench.__main__", None)
    with pytest.raises(ModuleNotFoundError):
        main(["bench", "--case", "smoke.kl"])
