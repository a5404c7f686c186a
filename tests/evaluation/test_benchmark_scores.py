"""A model on a benchmark: its replies, their scores, what is kept of them, and what is not."""

import json
import sqlite3

import pytest

from tests.evaluation.conftest import make_model
from tests.tasks.rows import COS_E, GPQA, HUMANEVAL, MBPP, TOOLS
from unisd.benchmarks import base, benchmarks
from unisd.cli import main
from unisd.evaluation.benchmark import evaluate_benchmark
from unisd.scoring.choice import strict_letter
from unisd.tasks import read_rows

ROWS = [{**COS_E, "question": f"Where does kite {n} fly?", "topic": "ab"[n % 2]} for n in range(6)]


class Writer:
    """Answers each prompt by a function of it; may be killed in the middle."""

    identity, batch_size = "writer", 2

    def __init__(self, reply, dies_after=None):
        self.reply, self.dies_after, self.written = reply, dies_after, 0

    def batches(self, requests):
        return [list(range(len(requests)))[i : i + 2] for i in range(0, len(requests), 2)]

    def replies(self, requests, sampling):
        assert (sampling.temperature, sampling.max_new_tokens) == (0.0, 1024)
        for place, request in enumerate(requests):
            if self.written == self.dies_after:
                raise KeyboardInterrupt
            self.written += 1
            yield place, self.reply(request.prompt)


def benchmark(**changes):
    settings = {"kind": "choice", "hub": "x/y", "splits": {"test": (None, "test")}, "source": "", "licence": ""}
    return base.Benchmark(**{"name": "kites", "group": "topic", **settings, **changes})


def right(prompt):
    """The right letter of a kite's question, and a wrong one of kite 5."""
    text = prompt[0]["content"]
    letter = next(line[0] for line in text.splitlines() if line.endswith("in the wind"))
    return f"Answer: {letter}" if "kite 5" not in text else "I do not know."


def test_scores_groups_and_completions(tmp_path):
    scores = evaluate_benchmark(
        benchmark(), [*ROWS, {**COS_E, "answer": "?"}], Writer(right), store=tmp_path / "r.sqlite"
    )
    assert scores.dropped == {"the answer is not one of the choices": 1}
    assert scores.measures["strict"].value == pytest.approx(5 / 6)
    assert scores.measures["strict_extracted"].value == pytest.approx(5 / 6)
    assert {name: group["strict"].value for name, group in scores.groups.items()} == {
        "a": 1.0,
        "b": pytest.approx(2 / 3),
    }
    rows = list(scores.completions())
    assert [row["number"] for row in rows] == list(range(6))
    assert [row["strict"] for row in rows] == [1.0] * 5 + [0.0]
    assert all(strict_letter(row["reply"], 3) == row["gold"] == row["found"] for row in rows[:5])
    # The order of the options is that of Random(42 + number).
    assert [row["gold"] for row in rows] == [each.answer for each in read_rows(ROWS, seed=42).examples]
    assert "83.3%  [43.6, 97.0]" in scores.table()


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    store = tmp_path / "replies.sqlite"
    first = Writer(right, dies_after=4)
    with pytest.raises(KeyboardInterrupt):
        evaluate_benchmark(benchmark(), ROWS, first, store=store)
    second = Writer(right)
    scores = evaluate_benchmark(benchmark(), ROWS, second, store=store)
    assert (first.written, second.written) == (4, 2)
    assert scores.measures["strict"].count == 6


def test_nothing_of_a_secret_benchmark_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rows = [{**GPQA, "High-level domain": "Physics"}] * 2
    scores = evaluate_benchmark(benchmarks()["gpqa"], rows, Writer(lambda _: "quorn of course\nAnswer: A"))
    text = json.dumps([*scores.completions()]) + json.dumps(scores.as_dict()) + scores.table()
    assert not any(word in text for word in ("quorn", "lightest", "blip", "mond"))
    assert scores.measures["strict_extracted"].value == 1.0
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"quorn" in path.read_bytes() for path in kept)
    captured = capsys.readouterr()
    assert "quorn" not in captured.out + captured.err


@pytest.mark.parametrize(
    ("name", "rows", "reply", "measure"),
    [
        ("mbpp", [MBPP], "```python\ndef add_one(n):\n    return n + 1\n```", "pass@1"),
        ("humaneval", [HUMANEVAL], "```python\ndef total(xs):\n    return sum(xs)\n```", "pass@1"),
        ("toolalpaca", [TOOLS], 'Action: findLamp\nAction Input: {"room": "hall"}', "full"),
    ],
)
def test_code_and_tools(name, rows, reply, measure, tmp_path):
    writer = Writer(lambda _: reply)
    scores = evaluate_benchmark(benchmarks()[name], rows, writer, unsafe_code=True, store=tmp_path / "r.sqlite")
    assert next(scores.completions())[measure] == 1.0
    assert scores.measures[measure].value == pytest.approx(1 / len(scores.items))


@pytest.fixture
def saved(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path / "cache"))
    make_model(0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def test_the_command_writes_scores_and_completions(saved, capsys):
    options = ["--model", str(saved / "model"), "--data", str(saved / "rows.jsonl"), "--max_new_tokens", "4"]
    options += ["--device", "cpu", "--limit", "4", "--likelihood", "-o", str(saved / "out")]
    assert main(["eval", "cos_e", *options]) == 0
    said = capsys.readouterr().out
    assert "cos_e: 4 items" in said
    result = json.loads((saved / "out" / "cos_e.json").read_text())
    assert (result["items"], result["limit"], result["split"], result["file"]) == (4, 4, "validation", "rows.jsonl")
    assert set(result["scores"]) == {"strict", "lenient", "strict_extracted", "lenient_extracted", "likelihood"}
    assert result["decoding"] == "greedy, at most 4 tokens, by transformers"
    assert result["environment"]["transformers"]
    rows = [json.loads(line) for line in (saved / "out" / "cos_e.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    with sqlite3.connect(saved / "cache" / "replies.sqlite") as connection:
        replies = {reply for (reply,) in connection.execute("SELECT reply FROM replies")}
    assert {row["reply"] for row in rows} == replies


@pytest.mark.parametrize(
    ("words", "of_benchmarks"),
    [
        (["cos_e"], True),
        (["--model", "x", "cos_e"], True),
        (["--limit", "3", "cos_e", "mbpp"], True),
        (["cos_e", "--model", "drift"], True),
        (["procedural", "--model", "mbpp"], False),
    ],
)
def test_which_command_line_it_is(words, of_benchmarks, monkeypatch):
    from unisd.cli import evaluate, evaluate_benchmarks

    class Loading(Exception):
        pass

    def load(*_, **__):
        raise Loading

    seen = []
    monkeypatch.setattr(evaluate_benchmarks, "main", lambda arguments: seen.append(arguments) or 0)
    monkeypatch.setattr(evaluate, "load_model", load)
    if of_benchmarks:
        assert evaluate.main(words) == 0
        assert seen == [words]
    else:
        with pytest.raises(Loading):
            evaluate.main(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cos_e", "mbpp", "--data", "x.jsonl"], "--data is the file of one benchmark, and 2 are asked for"),
        (["cos_e", "--likelihood", "--generator", "vllm"], "--likelihood needs the model in this process"),
        (["cos_e", "--adapter", "a", "--generator", "vllm"], "--adapter needs the model in this process"),
        (["cos_e", "--attn_implementation", "sdpa", "--generator", "vllm"], "--attn_implementation needs the model"),
        (["cos_e", "--dtype", "float32", "--generator", "http://h:1"], "--dtype needs the model in this process"),
        (["cos_e", "--generator_options", "[1]"], "must be a JSON object such as"),
        (["cos_e", "--generator_options", '{"seed": 1}'], "generator_options are of the generator vllm"),
        (["cos_e", "--split", "test"], "cos_e has the splits train, validation, not 'test'"),
        (["toolalpaca"], "toolalpaca is not on the hub"),
        (["cos_e", "poems"], "poems"),
    ],
)
def test_mistakes_are_named(saved, words, message, capsys):
    assert main(["eval", *words, "--model", str(saved / "model")]) == 2
    assert message in capsys.readouterr().err


def test_vllm_gets_its_options_and_the_dtype(saved, monkeypatch):
    given = []

    def make(*_, options, **__):
        given.append(options)
        raise ValueError("no vLLM here")

    monkeypatch.setattr("unisd.cli.evaluate_benchmarks.make_generator", make)
    monkeypatch.setattr("unisd.cli.prepare.make_generator", make)
    of_vllm = ["--generator", "vllm", "--generator_options", '{"max_model_len": 64}', "--model", str(saved / "model")]
    rows = str(saved / "rows.jsonl")
    assert main(["eval", "cos_e", *of_vllm, "--data", rows, "--dtype", "float32"]) == 2
    assert main(["eval", "cos_e", *of_vllm, "--data", rows]) == 2
    assert main(["prepare", rows, *of_vllm, "-o", str(saved / "prepared")]) == 2
    assert given == [{"dtype": "float32", "max_model_len": 64}, {"max_model_len": 64}, {"max_model_len": 64}]


def test_likelihood_takes_the_most_probable_letter(tokenizer, tmp_path):
    model = make_model(3)
    writer = Writer(right)
    scores = evaluate_benchmark(benchmark(), ROWS, writer, scored_by=(model, tokenizer), store=tmp_path / "r.sqlite")
    import torch

    for item in scores.items:
        text = [{"role": "user", "content": item.example.prompt}]
        ids = tokenizer.apply_chat_template(text, add_generation_prompt=True, return_dict=False)
        start = ids + tokenizer("Answer: ", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([start])).logits[0, -1]
        letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "ABC"]
        best = "ABC"[int(logits[letters].argmax())]
        assert item.scored.values["likelihood"] == float(best == item.example.answer)
    with pytest.raises(ValueError, match="likelihoods are of multiple choice"):
        evaluate_benchmark(benchmarks()["mbpp"], [MBPP], writer, scored_by=(model, tokenizer))
