"""The benchmark compares contenders that compute the same thing, and says so when one does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.__main__ import gradient_error
from bench.cases import CASES, make_inputs
from bench.memory import extra_peak_bytes
from bench.peers import PEERS
from bench.timing import median_ratio

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_contenders_agree(beta):
    inputs = make_inputs(CASES["smoke"], torch.device("cpu"))
    results = {name: peer.build(inputs, beta)() for name, peer in PEERS.items()}
    loss, gradient = results.pop("unisd_kernels")
    assert gradient_error(gradient, inputs, beta, int(inputs.cu_seqlens[1])) < 1e-5
    for name, (other_loss, other_gradient) in results.items():
        if name != "gemm floor":
            torch.testing.assert_close(other_loss, loss, rtol=1e-4, atol=1e-6, msg=name)
            torch.testing.assert_close(other_gradient, gradient, rtol=1e-3, atol=1e-7, msg=name)


def test_a_wrong_gradient_shows_in_the_error_column():
    inputs = make_inputs(CASES["smoke"], torch.device("cpu"))
    _, gradient = PEERS["unisd_kernels"].build(inputs, 0.0)()
    assert gradient_error(gradient * 1.01, inputs, 0.0, int(inputs.cu_seqlens[1])) > 5e-3


def test_a_slow_contender_shows_in_the_ratio():
    samples = {"a": [2.0, 4.0, 9.0], "floor": [1.0, 2.0, 3.0]}
    assert median_ratio(samples, "a", "floor") == 2.0


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


def test_moving_average_command(monkeypatch, capsys, tmp_path):
    from bench import ema

    monkeypatch.setattr(ema, "SHAPES", [(7, 5), (3,)])
    monkeypatch.setattr(ema, "FOLLOWED", (20, 200))
    monkeypatch.setattr(sys, "argv", ["bench.ema", "--rounds", "1", "--output", str(tmp_path / "ema.json")])
    ema.main()
    written = json.loads((tmp_path / "ema.json").read_text())
    errors = {row["teacher"]: row for row in written["errors"]}
    # What the command is for: plain bfloat16 stalls, ours do not.
    assert errors["naive bfloat16"]["progress"] < 0.5
    for name in ("compensation", "stochastic", "float32 shadow"):
        assert abs(errors[name]["progress"] - 1) < 0.02
    assert all(row["samples_seconds"] for row in written["times"])
    assert "| compensation |" in capsys.readouterr().out


def test_numerics_command(monkeypatch, capsys, tmp_path):
    from bench import numerics

    for name, value in (("ROWS", 4), ("WIDTH", 32), ("COLUMNS", 1000), ("TARGETS", (1e-1, 1e-5))):
        monkeypatch.setattr(numerics, name, value)
    monkeypatch.setattr(sys, "argv", ["bench.numerics", "--output", str(tmp_path / "numerics.json")])
    numerics.main()
    rows = json.loads((tmp_path / "numerics.json").read_text())["rows"]
    assert len(rows) == 2 * 3 * 4
    for row in rows:
        if "difference form" in row["contender"]:
            assert row["largest"] < 1e-3
        if row["contender"] == "bfloat16 logits" and row["mean"] < 1e-4:
            assert row["largest"] > 1e-2
    assert "| forward KL |" in capsys.readouterr().out
