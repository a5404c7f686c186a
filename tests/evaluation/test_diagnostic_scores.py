"""The diagnostic of a model: shares by number of steps, kinds of replies, and the command."""

import json

import pytest

from tests.evaluation.conftest import make_model
from unisd.cli import main
from unisd.data.diagnostic import DiagnosticSettings, diagnostic_tasks
from unisd.evaluation.diagnostic import evaluate_diagnostic

TASKS = diagnostic_tasks(8, DiagnosticSettings(num_steps=(3, 6)))


def test_shares_by_number_of_steps(tokenizer):
    traces = {task.question: (task.gold_trace, task.wrong_trace) for task in TASKS}
    limits = []

    def generate(prompts, limit):
        limits.append(limit)
        gold, wrong = zip(*(traces[prompt[0]["content"]] for prompt in prompts), strict=True)
        if len(limits) == 1:
            return gold
        return [wrong[0], "", gold[2].splitlines()[0] + "\n" + gold[2].splitlines()[-1], gold[3]]

    scores = evaluate_diagnostic(None, tokenizer, TASKS, generate=generate)
    assert scores.kinds[3]["exact"] == 4
    found = {kind: count for kind, count in scores.kinds[6].items() if count}
    assert found == {"exact": 1, "wrong": 1, "missing": 1, "under_executed": 1}
    assert scores.by_steps[3]["first_answer"].value == scores.by_steps[3]["exact_steps"].value == 1.0
    measures = scores.by_steps[6]
    assert measures["first_answer"].value == measures["all_exact"].value * 2 == 0.5
    assert measures["executed_steps"].value == pytest.approx((6 + 0 + 1 + 6) / 24)
    assert (6 + 1) / 24 < measures["exact_steps"].value < (6 + 0 + 1 + 6) / 24
    # As long as the right replies with that number of steps, twice.
    assert limits == [2 * max(len(task.gold_trace) for task in TASKS if len(task.steps) == n) + 8 for n in (3, 6)]
    rows = list(scores.completions())
    assert [row["num_steps"] for row in rows] == [3, 6] * 4
    assert rows[0]["answer"] == rows[0]["gold"].rpartition(" ")[2]
    assert "100%  [51, 100]" in scores.table()


def test_no_tasks(tokenizer):
    with pytest.raises(ValueError, match="there are no tasks"):
        evaluate_diagnostic(None, tokenizer, [])


def test_the_command(tmp_path, tokenizer, capsys):
    make_model(0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    output = tmp_path / "scores.json"
    options = ["--model", str(tmp_path / "model"), "--device", "cpu", "--count", "3", "--steps", "2", "1"]
    words = ["eval", "diagnostic", *options, "--values", "unit", "--operations", "+", "-", "--look-back", "2"]
    assert main([*words, "--output", str(output)]) == 0
    assert "first answer" in capsys.readouterr().out
    scores = json.loads(output.read_text())
    assert {steps: sum(kinds.values()) for steps, kinds in scores["kinds"].items()} == {"1": 1, "2": 2}
    rows = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    assert [row["num_steps"] for row in rows] == [2, 1, 2]
    assert all("/" not in row["gold"] and "*" not in row["gold"] for row in rows)
    assert main(["eval", "procedural", *options, "--values", "unit"]) == 2
    assert "--values has no effect with procedural" in capsys.readouterr().err
    assert main(["eval", "diagnostic", *options, "--look-back", "8"]) == 2
    assert "look_back must be in 1..7, got 8" in capsys.readouterr().err
