"""`python -m bench recipes`: from a file of rows to the losses of a run, or to what it said as it failed."""

from __future__ import annotations

import json
import types

from bench.__main__ import main
from bench.studies import recipes
from tests.evaluation.conftest import make_model, tokenizer  # noqa: F401
from unisd.cli import main as unisd


def test_from_the_file_to_the_losses(tmp_path, monkeypatch, tokenizer, capsys):  # noqa: F811
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path / "cache"))
    base, rows, output = tmp_path / "base", tmp_path / "rows.jsonl", tmp_path / "result.json"
    make_model(0).save_pretrained(base)
    tokenizer.save_pretrained(base)
    lines = [{"question": f"what is {n} plus {n}", "answer": f"it is {2 * n}"} for n in range(6)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def in_this_process(*words):
        return types.SimpleNamespace(returncode=unisd([str(word) for word in words]), stderr="as the command said"), 1.0

    monkeypatch.setattr(recipes, "_unisd", in_this_process)
    options = ["--model", base, "--contexts", "--presets", "plain", "unisd_star", "--modes", "lora", "--steps", "2"]
    options += ["--new_tokens", "3", "--work", tmp_path / "work", "--output", output]
    assert main(["recipes", str(rows), *map(str, options)]) == 0
    capsys.readouterr()
    trained = json.loads(output.read_text())["trained"]
    assert [row["preset"] for row in trained] == ["plain", "unisd_star"]
    for row in trained:
        assert len(row["losses"]) == 2
        assert row["first_loss"] == row["losses"][0] > 0
        assert row["last_loss"] == row["losses"][1]
    assert main(["recipes", str(tmp_path / "absent.jsonl"), *map(str, options)]) == 0
    assert [row["failure"] for row in json.loads(output.read_text())["trained"]] == ["as the command said"] * 2
