"""`unisd eval BENCHMARK --via lm-eval`: what the harness is asked, and its answer in the form of our results."""

import json

import pytest

from tests.evaluation.conftest import make_model
from tests.tasks.rows import GPQA, HUMANEVAL
from unisd.benchmarks import benchmarks
from unisd.cli import main
from unisd.compare.runs import load_run
from unisd.evaluation import lm_eval as harness
from unisd.evaluation.lm_eval import TASKS, HarnessScores, checked_rows, task_of

ARC = [
    {
        "id": str(n),
        "question": f"Where does kite {n} fly?",
        "choices": {"text": ["in the wind", "under water"], "label": ["A", "B"]},
        "answerKey": "AB"[n % 2],
    }
    for n in range(3)
]
ASKED = "Question: Where?\nAnswer:"
CHOSEN = {
    "doc_id": 4,
    "target": 0,
    "arguments": [(ASKED, " wind"), (ASKED, " water")],
    "filtered_resps": [(-3.0, False), (-1.5, True)],
    "resps": [[(-3.0, False)], [(-1.5, True)]],
    "acc": 0.0,
    "acc_norm": 1.0,
}
WRITTEN = {
    "doc_id": 0,
    "target": "check(total)",
    "arguments": [("def total(xs):\n", {"until": []})],
    "resps": [["    return sum(xs)\n"]],
    "filtered_resps": [["def total(xs):\n    return sum(xs)\n"]],
    "pass@1": 1.0,
}


def scores(name, *samples):
    benchmark, task = benchmarks()[name], TASKS[name]
    rows = tuple(harness._row(sample, task, benchmark.secret) for sample in samples)
    return HarnessScores(benchmark, task, "0.4.13", "1.0", rows, {"num_fewshot": 0})


def test_samples_become_rows_that_compare_reads(tmp_path):
    arc, code = scores("arc_challenge", CHOSEN, {**CHOSEN, "doc_id": 5, "acc": 1.0}), scores("humaneval", WRITTEN)
    row = {"number": 4, "group": "", "acc": 0.0, "acc_norm": 1.0, "prompt": ASKED, "gold": "wind", "reply": "water"}
    assert arc.rows[0] == {**row, "found": ""}
    assert code.rows[0]["reply"] == "    return sum(xs)\n"
    for each in (arc, code):
        file = tmp_path / f"{each.benchmark.name}_lm_eval.json"
        file.write_text(json.dumps(each.as_dict()))
        file.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in each.completions()))
    run = load_run(tmp_path)
    assert {name: result.measure for name, result in run.benchmarks.items()} == {
        "arc_challenge (lm-eval)": "acc",
        "humaneval (lm-eval)": "pass@1",
    }
    found = run.benchmarks["arc_challenge (lm-eval)"]
    assert found.result["via"] == "lm-eval 0.4.13"
    assert found.result["scores"]["acc"] == pytest.approx(
        {"value": 0.5, "low": 0.0945, "high": 0.9055, "count": 2}, abs=1e-3
    )
    assert found.rows[4]["acc_norm"] == 1.0


def test_nothing_of_a_secret_benchmark_is_kept():
    kept = scores("gpqa", CHOSEN)
    assert kept.rows == ({"number": 4, "group": "", "acc": 0.0, "acc_norm": 1.0},)
    assert "wind" not in json.dumps(kept.as_dict()) + kept.table()


def test_rows_without_what_the_task_reads_are_refused():
    assert checked_rows(TASKS["arc_challenge"], ARC)[0] == {
        name: ARC[0][name] for name in TASKS["arc_challenge"].columns
    }
    sanitized = {"prompt": "Add one.", "code": "", "test_list": ["assert True"] * 3}
    with pytest.raises(ValueError, match=r"row 1 has no text: the task mbpp of .* reads the columns text, test_list"):
        checked_rows(TASKS["mbpp"], [sanitized])


def test_code_is_judged_in_the_sandbox():
    from unisd.sandbox import Sandbox

    metric = harness._CodeEval(Sandbox(unsafe_code=True))
    right, wrong = "def f(): return 1", "def f(): return 2"
    found = metric.compute(references=["assert f() == 1"] * 2, predictions=[[right], [wrong]], k=[1])
    assert found[0] == {"pass@1": 0.5}
    with pytest.raises(ValueError, match="once a problem"):
        metric.compute(references=["assert True"], predictions=[[right]], k=[1, 10])


@pytest.mark.parametrize("name", ["scienceqa", "cos_e", "toolalpaca"])
def test_what_the_harness_has_not_is_said(name, capsys):
    assert main(["eval", name, "--via", "lm-eval"]) == 2
    assert (
        f"no task with the rows of {name}; it has one of arc_challenge, gpqa, humaneval, mbpp"
        in capsys.readouterr().err
    )


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'unisd-kernels\[lm-eval\]'"):
        task_of("mbpp")


def test_options_that_the_task_decides(capsys):
    for option in (["--likelihood"], ["--seed", "3"], ["--split", "test"]):
        assert main(["eval", "arc_challenge", "--via", "lm-eval", *option]) == 2
        assert f"{option[0]} has no effect with --via lm-eval" in capsys.readouterr().err


@pytest.fixture
def saved(tmp_path, tokenizer, monkeypatch):
    """A model's folder; the tests that ask for it use the real package."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra lm-eval)")
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path / "cache"))
    make_model(0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


def run(saved, name, rows, *options):
    (saved / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", name, "--via", "lm-eval", "--data", str(saved / "rows.jsonl"), "--model", str(saved / "model")]
    assert main([*words, "--device", "cpu", "-o", str(saved / "out"), *options]) == 0
    return load_run(saved / "out").benchmarks[f"{name} (lm-eval)"]


def test_the_real_package_on_options(saved, tokenizer):
    import torch

    found = run(saved, "arc_challenge", ARC, "--limit", "2")
    assert (found.result["items"], found.result["limit"], found.result["task"]["name"]) == (2, 2, "arc_challenge")
    model = make_model(0).eval()
    for number, row in found.rows.items():
        sums = []
        start = tokenizer(f"Question: {ARC[number]['question']}\nAnswer:")["input_ids"]
        for text in ARC[number]["choices"]["text"]:
            ids = tokenizer(f"Question: {ARC[number]['question']}\nAnswer: {text}")["input_ids"]
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(logprobs[place - 1, ids[place]].item() for place in range(len(start), len(ids))))
        assert row["acc"] == float("AB"[sums.index(max(sums))] == ARC[number]["answerKey"])


def test_the_real_package_on_code(saved, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, **_: ["    return sum(xs)\n"] * len(requests))
    found = run(saved, "humaneval", [HUMANEVAL], "--unsafe_code")
    assert found.result["scores"]["pass@1"]["value"] == 1.0
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, **_: ["    return 0\n"] * len(requests))
    assert run(saved, "humaneval", [HUMANEVAL], "--unsafe_code").result["scores"]["pass@1"]["value"] == 0.0


def test_the_real_package_keeps_a_secret(saved):
    found = run(saved, "gpqa", [GPQA])
    assert found.result["items"] == 1
    texts = [path.read_bytes() for path in (saved / "out").iterdir()]
    assert not any(word in text for text in texts for word in (b"lightest", b"blip", b"mond"))
