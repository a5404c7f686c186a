"""Several evaluations by one command, and their files beside those of benchmarks."""

import json

import pytest

from tests.evaluation.conftest import make_model
from unisd.cli import main
from unisd.compare import load_run
from unisd.compare.groups import group_runs
from unisd.compare.tables import score_table
from unisd.scoring import wilson


@pytest.fixture
def words(tmp_path, tokenizer):
    for seed in (0, 1):
        make_model(seed).save_pretrained(tmp_path / str(seed))
        tokenizer.save_pretrained(tmp_path / str(seed))
    return ["--model", str(tmp_path / "0"), "--device", "cpu"]


def test_one_load_of_the_model_and_a_file_for_each(tmp_path, words, monkeypatch, capsys):
    from unisd.cli import evaluate

    loads, load = [], evaluate.load_model
    monkeypatch.setattr(evaluate, "load_model", lambda *a, **k: loads.append(a[0]) or load(*a, **k))
    probe, run, base = tmp_path / "items.jsonl", tmp_path / "run", tmp_path / "base"
    probe.write_text('{"kind": "harmless", "prompt": "hello?"}\n')
    tasks = ["--count", "2", "--steps", "1", "2"]
    more = [*tasks, "--max_new_tokens", "4", "--probe", str(probe), "--base", str(tmp_path / "1")]
    names = ["procedural", "diagnostic", "drift", "behaviour"]
    assert main(["eval", *names, *words, *more, "-o", str(run / "eval")]) == 0
    assert loads == [str(tmp_path / "0"), str(tmp_path / "1")]
    assert sorted(file.name for file in (run / "eval").iterdir()) == sorted(
        [f"{name}.json" for name in names] + [f"{name}.jsonl" for name in names if name != "drift"]
    )
    written = {name: json.loads((run / "eval" / f"{name}.json").read_text()) for name in names}
    assert all({"model", "seconds", "peak_memory_gib", "environment"} <= result.keys() for result in written.values())
    assert written["diagnostic"]["settings"]["steps"] == [1, 2]
    assert "steps" not in written["drift"]["settings"]
    assert written["behaviour"]["settings"] == {"probe": "items.jsonl"}

    assert main(["eval", "procedural", "diagnostic", *words, *tasks, "-o", str(base)]) == 0
    table = score_table(group_runs([load_run(base), load_run(run)]))
    assert list(table) == ["diagnostic", "procedural"]
    assert [score.difference.count for _, score in table.values()] == [2, 2]
    other = [*tasks, "--seed", "1"]
    assert main(["eval", "procedural", *words, *other, "--output", str(base / "procedural.json")]) == 0
    assert score_table(group_runs([load_run(base), load_run(run)]))["procedural"][1].difference is None
    assert main(["eval", "procedural", *words, *other, "--no-accuracy", "-o", str(base)]) == 0
    assert score_table(group_runs([load_run(base)]))["procedural"][0].value is None
    assert main(["compare", str(base), str(run), "-o", str(tmp_path / "page")]) == 0
    capsys.readouterr()


def test_scores_of_all_tasks_have_wilson_intervals(tokenizer):
    from unisd.data.diagnostic import DiagnosticSettings, diagnostic_tasks
    from unisd.data.procedural import procedural_rows
    from unisd.evaluation import evaluate_procedural
    from unisd.evaluation.diagnostic import evaluate_diagnostic

    rows = procedural_rows(6, num_steps=(1, 2), num_auxiliary=0)
    gold = {row["prompt"][0]["content"]: row["completion"] for row in rows}
    replies = lambda prompts: [gold[prompts[0][0]["content"]], "Answer: 0", ""]  # noqa: E731
    scores = evaluate_procedural(None, tokenizer, rows, perplexity=False, generate=replies)
    assert scores.as_dict()["scores"] == {"accuracy": wilson(2, 6).as_dict(), "answered": wilson(4, 6).as_dict()}
    assert scores.as_dict()["by_steps"][0]["scores"]["answered"] == wilson(2, 3).as_dict()
    found = list(scores.completions())
    assert [(row["number"], row["accuracy"], row["answered"]) for row in found] == [
        (0, 1.0, 1.0), (1, 1.0, 1.0), (2, 0.0, 1.0), (3, 0.0, 1.0), (4, 0.0, 0.0), (5, 0.0, 0.0),
    ]  # fmt: skip
    assert found[0]["gold"] == found[0]["reply"] == gold[found[0]["prompt"][0]["content"]]

    tasks = diagnostic_tasks(4, DiagnosticSettings(num_steps=(1, 2)))
    right = {task.question: task.gold_trace for task in tasks}
    replies = lambda prompts, limit: [right[prompts[0][0]["content"]], "S3 = 1"]  # noqa: E731
    diagnostic = evaluate_diagnostic(None, tokenizer, tasks, generate=replies)
    assert diagnostic.as_dict()["scores"]["first_answer"] == wilson(2, 4).as_dict()
    assert diagnostic.measures["executed_steps"].value == (1 + 1 + 1 + 0.5) / 4
    values = [(row["number"], row["first_answer"], row["executed_steps"]) for row in diagnostic.completions()]
    assert values == [(0, 1.0, 1.0), (1, 1.0, 1.0), (2, 0.0, 1.0), (3, 0.0, 0.5)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["procedural", "drift", "--output", "x.json"], "--output is the file of one evaluation, and 2 are asked for"),
        (["procedural", "-o", "x.json"], "x.json is a folder"),
        (["procedural", "-o", "x", "--output", "x.json"], "are two names for one thing"),
        (["drift", "behaviour", "--count", "3"], "--count has no effect on drift without --dataset"),
        (["procedural", "cos_e"], "cos_e is a benchmark, which has options of its own"),
        (["procedural", "drift"], "no PEFT adapter that could be switched off"),
        (["procedral"], "there is no 'procedral'; did you mean procedural?"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_evaluated(words, given, message, capsys):
    assert main(["eval", *given, *words]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert "steps" not in said.out


def test_two_files_of_one_benchmark_are_not_mixed(tmp_path):
    result = {"benchmark": "procedural", "kind": "procedural", "scores": {}}
    for name in ("a", "procedural", "procedural-hard"):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=r"two files with scores of procedural; one is procedural\.json"):
        load_run(tmp_path)
    (tmp_path / "a.json").unlink()
    assert sorted(load_run(tmp_path).benchmarks) == ["procedural", "procedural-hard"]
