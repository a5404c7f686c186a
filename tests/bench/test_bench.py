"""The commands of the benchmark: what they print and write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.measuring.memory import extra_peak_bytes

ROOT = Path(__file__).parents[2]


def test_memory_sees_what_a_step_holds():
    def step():
        return torch.ones(50_000_000)

    extra = extra_peak_bytes(step, torch.device("cpu"))
    assert 180e6 < extra < 260e6


def test_command_writes_samples_and_surroundings(tmp_path):
    output = tmp_path / "result.json"
    command = [sys.executable, "-m", "bench", "--case", "smoke", "--rounds", "2", "--output", str(output)]
    done = subprocess.run([*command, "--peers", "unisd_kernels"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "| forward KL | unisd_kernels |" in done.stdout
    result = json.loads(output.read_text())
    assert result["environment"]["versions"]["torch"] == torch.__version__
    assert "--case smoke" in result["environment"]["command"]
    assert all(len(row["samples_seconds"]) == 2 for row in result["rows"])
    assert all(row["extra_peak_bytes"] >= 0 for row in result["rows"] if row["peer"] == "unisd_kernels")


def test_a_copy_without_history_can_be_told_its_commit(monkeypatch):
    from bench.records import environment

    monkeypatch.setattr(environment, "_output_of", lambda *command: None)
    monkeypatch.setenv("UNISD_COMMIT", "abc1234")
    assert environment.environment(torch.device("cpu"))["commit"] == "abc1234"


def test_the_command_stands_as_it_is_typed():
    from bench.records.environment import command_line

    assert command_line(["/x/bench/__main__.py", "suite", "--peers", "unisd fused"]) == (
        "python -m bench suite --peers 'unisd fused'"
    )
    assert command_line(["/x/bin/unisd", "bench", "--case", "kl"]) == "unisd bench --case kl"


def test_moving_average_command(monkeypatch, capsys, tmp_path):
    from bench.studies import ema

    monkeypatch.setattr(ema, "SHAPES", [(7, 5), (3,)])
    monkeypatch.setattr(ema, "FOLLOWED", (20, 200))
    assert ema.main(["--rounds", "1", "--output", str(tmp_path / "ema.json")]) == 0
    written = json.loads((tmp_path / "ema.json").read_text())
    errors = {row["teacher"]: row for row in written["errors"]}
    # What the command is for: plain bfloat16 stalls, ours do not.
    assert errors["naive bfloat16"]["progress"] < 0.5
    for name in ("compensation", "stochastic", "float32 shadow"):
        assert abs(errors[name]["progress"] - 1) < 0.02
    assert all(row["samples_seconds"] for row in written["times"])
    assert "| compensation |" in capsys.readouterr().out


def test_numerics_command(monkeypatch, capsys, tmp_path):
    from bench.studies import numerics

    for name, value in (("ROWS", 4), ("WIDTH", 32), ("COLUMNS", 1000), ("TARGETS", (1e-1, 1e-5))):
        monkeypatch.setattr(numerics, name, value)
    assert numerics.main(["--output", str(tmp_path / "numerics.json")]) == 0
    rows = json.loads((tmp_path / "numerics.json").read_text())["rows"]
    assert len(rows) == 2 * 3 * 4
    for row in rows:
        if "difference form" in row["peer"]:
            # Of differences in bfloat16, where the processor multiplies such; else a thousandth of it.
            assert row["largest"] < 5e-3
        if row["peer"] == "bfloat16 logits" and row["mean"] < 1e-4:
            assert row["largest"] > 1e-2
    assert "| forward KL |" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--deadline", "531"], ["--sideways"]])
def test_the_script_refuses_what_it_cannot_keep(arguments, tmp_path):
    done = subprocess.run(
        ["bash", "scripts/gpu_suite.sh", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "OUT": str(tmp_path / "out")},
    )
    assert done.returncode == 2
    assert not (tmp_path / "out").exists()
