"""`python -m bench rollouts`: samples of every case, and the ratios that they give."""

import json
import statistics

import pytest

from bench.__main__ import main


def test_the_ratios_are_those_of_the_samples(tmp_path, capsys):
    output = tmp_path / "rollouts.json"
    options = ["--device", "cpu", "--model", "tiny", "--rounds", "3", "--new_tokens", "3", "--prompt_tokens", "5"]
    assert main(["rollouts", *options, "--batch_size", "2", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    samples = found["samples_seconds"]
    assert {name: len(times) for name, times in samples.items()} == {"base": 3, "adapter": 3, "merged": 3}
    for name, ratio in found["ratio_to_base"].items():
        assert ratio == pytest.approx(statistics.median(a / b for a, b in zip(samples[name], samples["base"])))
    assert f"adapter / merged: {found['adapter_over_merged']:.2f}" in capsys.readouterr().out
