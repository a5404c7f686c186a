"""Drift on the two models' own completions, against dense logits."""

import copy
import json
import math
import statistics

import pytest
import torch

from tests.tasks.rows import COS_E
from unisd.benchmarks import benchmarks
from unisd.cli import main
from unisd.data.procedural import procedural_rows
from unisd.evaluation.drift import evaluate_drift
from unisd.evaluation.task_prompts import task_prompts
from unisd.generation import greedy_replies
from unisd.prepare.folder import save_prepared
from unisd.prepare.pipeline import prepare
from unisd.prepare.settings import PrepareSettings
from unisd.prepare.sources import load_rows
from unisd.tasks import read_rows

PROMPTS = [[{"role": "user", "content": text}] for text in ("What is up?", "Say it.", "a b c")]


def dense(net, tokenizer, prompt, reply):
    """Log-probabilities [T, V] of a reply's tokens and their ids, from full logits of one sequence."""
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    start = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer(reply, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = net(torch.tensor([start + ids])).logits[0, len(start) - 1 : -1]
    return torch.log_softmax(logits.double(), -1), torch.tensor(ids)


def expected(writer, reader, base, tuned, tokenizer):
    perplexity, jsd, changes = [], [], []
    for prompt, reply in zip(PROMPTS, greedy_replies(writer, tokenizer, PROMPTS, max_new_tokens=6), strict=True):
        (b, ids), (t, _) = (dense(net, tokenizer, prompt, reply) for net in (base, tuned))
        read = b if reader is base else t
        perplexity.append(math.exp(-read.gather(1, ids[:, None]).mean()))
        m = torch.logaddexp(b, t) - math.log(2)
        jsd.append(0.5 * ((b.exp() * (b - m)).sum(1) + (t.exp() * (t - m)).sum(1)).mean().item())
        changes += (t - b).gather(1, ids[:, None])[:, 0].tolist()
    return perplexity, jsd, changes


def test_equals_the_dense_computation(model, other_model, tokenizer):
    scores = evaluate_drift(other_model, tokenizer, PROMPTS, base_model=model, max_new_tokens=6, batch_size=2)
    for own, (writer, reader) in (
        (scores.of_tuned, (other_model, model)),
        (scores.of_base, (model, other_model)),
    ):
        perplexity, jsd, changes = expected(writer, reader, model, other_model, tokenizer)
        assert own.perplexity == pytest.approx(perplexity, rel=1e-4)
        assert own.jsd == pytest.approx(jsd, rel=1e-4)
        assert sorted(own.changes) == pytest.approx(sorted(changes), rel=1e-3, abs=1e-5)
    # What a model writes greedily is likelier to itself than to another.
    assert statistics.fmean(scores.of_tuned.changes) > 0 > statistics.fmean(scores.of_base.changes)
    found = scores.as_dict()
    assert found["of_tuned"]["perplexity"]["value"] == pytest.approx(scores.forward_perplexity.value)
    assert found["of_base"]["perplexity_percentiles"]["50"] == pytest.approx(sorted(scores.of_base.perplexity)[1])
    assert found["jsd"]["count"] == 6
    assert "forward perplexity" in scores.table()


def test_an_adapter_is_compared_with_its_base_in_one_load(lora_model, tokenizer):
    base = copy.deepcopy(lora_model).unload()
    one = evaluate_drift(lora_model, tokenizer, PROMPTS, max_new_tokens=5, golds=["x y", "z", "w"])
    two = evaluate_drift(lora_model, tokenizer, PROMPTS, base_model=base, max_new_tokens=5, golds=["x y", "z", "w"])
    assert one.of_tuned.perplexity == pytest.approx(two.of_tuned.perplexity, rel=1e-4)
    assert one.of_base.perplexity == pytest.approx(two.of_base.perplexity, rel=1e-4)
    assert one.gold_perplexity == pytest.approx(two.gold_perplexity, rel=1e-5)
    assert one.gold_perplexity[0] != one.gold_perplexity[1]
    assert "gold perplexity" in one.table()


def test_an_untouched_model_has_not_moved(model, tokenizer):
    scores = evaluate_drift(copy.deepcopy(model), tokenizer, PROMPTS, base_model=model, max_new_tokens=4)
    assert scores.jsd.value == pytest.approx(0.0, abs=1e-6)
    assert scores.forward_perplexity.value == pytest.approx(scores.reverse_perplexity.value)
    assert max(map(abs, scores.of_tuned.changes)) < 1e-5


def test_empty_completions_are_left_out_and_counted(model, other_model, tokenizer, monkeypatch):
    from unisd.evaluation import drift

    monkeypatch.setattr(drift, "greedy_replies", lambda *_, **__: ["", "ab", ""])
    scores = evaluate_drift(other_model, tokenizer, PROMPTS, base_model=model)
    assert (scores.of_tuned.empty, len(scores.of_tuned.perplexity)) == (2, 1)
    monkeypatch.setattr(drift, "greedy_replies", lambda *_, **__: [""] * 3)
    nothing = evaluate_drift(other_model, tokenizer, PROMPTS, base_model=model).as_dict()
    assert nothing["of_tuned"]["perplexity"]["value"] is None
    json.dumps(nothing, allow_nan=False)


def test_mistakes(model, tokenizer):
    with pytest.raises(ValueError, match="there are no prompts"):
        evaluate_drift(model, tokenizer, [], base_model=model)
    with pytest.raises(ValueError, match="has no PEFT adapter that could be switched off"):
        evaluate_drift(model, tokenizer, PROMPTS)


def test_the_command(model, other_model, tokenizer, tmp_path, capsys):
    for name, net in (("base", model), ("tuned", other_model)):
        net.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    words = ["eval", "drift", "--model", str(tmp_path / "tuned"), "--base", str(tmp_path / "base"), "--device", "cpu"]
    assert main([*words, "--max_new_tokens", "3", "--output", str(tmp_path / "drift.json")]) == 0
    assert "reverse perplexity" in capsys.readouterr().out
    assert json.loads((tmp_path / "drift.json").read_text())["of_tuned"]["completions"] == 24
    assert main(["eval", "retention", *words[2:], "--max_new_tokens", "3"]) == 2
    assert "--max_new_tokens has no effect with retention" in capsys.readouterr().err


@pytest.fixture
def drifting(model, other_model, tokenizer, tmp_path):
    """The words of a command, and a benchmark's file."""
    for name, net in (("base", model), ("tuned", other_model)):
        net.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = [{**COS_E, "question": f"Where does kite {n} fly?"} for n in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", "drift", "--model", str(tmp_path / "tuned"), "--base", str(tmp_path / "base"), "--device", "cpu"]
    return [*words, "--max_new_tokens", "3", "--output", str(tmp_path / "drift.json")], tmp_path / "rows.jsonl"


def test_a_task_stands_beside_the_chat(drifting, model, other_model, tokenizer, tmp_path, capsys):
    words, rows = drifting
    assert main([*words, "--dataset", "cos_e", "--data", str(rows), "--count", "3"]) == 0
    said = capsys.readouterr().out
    assert said.index("on general chat") < said.index("on 3 prompts of cos_e") < said.index("gold perplexity")
    found = json.loads((tmp_path / "drift.json").read_text())
    assert (found["of_tuned"]["completions"], found["gold_perplexity"]) == (24, None)
    assert (found["task"]["dataset"], found["task"]["split"], found["task"]["prompts"]) == ("cos_e", None, 3)
    # The prompts are those of `unisd eval cos_e`, the golds what training would learn.
    examples = read_rows(benchmarks()["cos_e"].rows("validation", str(rows)), kind="choice").examples[:3]
    prompts = [[{"role": "user", "content": each.prompt}] for each in examples]
    golds = [each.demonstration for each in examples]
    same = evaluate_drift(other_model, tokenizer, prompts, base_model=model, golds=golds, max_new_tokens=3).as_dict()
    assert found["task"]["jsd"] == pytest.approx(same["jsd"])
    assert found["task"]["gold_perplexity"] == pytest.approx(same["gold_perplexity"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", "3"], "--count has no effect on drift without --dataset"),
        (["--dataset", "cos_e", "--data", "ROWS", "--split", "test"], "is a file, which has no split 'test'"),
        (["--dataset", "ROWS", "--steps", "3"], "steps, look-back and seed are of procedural and diagnostic, not of"),
        (["--dataset", "procedural", "--data", "ROWS"], "goes with the name of one of arc_challenge, cos_e"),
    ],
)
def test_options_without_effect_on_drift(drifting, options, message, capsys):
    words, rows = drifting
    assert main([*words, *(str(rows) if word == "ROWS" else word for word in options)]) == 2
    assert message in capsys.readouterr().err


def test_prompts_of_every_kind_of_source(tmp_path):
    plain = task_prompts("procedural", 2, num_steps=[4], chats=False)
    assert (plain.source, plain.split, len(plain.golds)) == ("procedural", "test", 2)
    assert plain.prompts[0] == procedural_rows(1, split="test", num_steps=4)[0]["prompt"]
    assert len(task_prompts("diagnostic", 3, split="validation").prompts) == 3
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "What is 1 + 1?", "answer": "2"}) + "\n")
    asked = task_prompts(str(file), 5, chats=False)
    assert (asked.source, asked.split, asked.golds) == ("rows.jsonl", None, ("2",))
    assert asked.prompts[0].startswith("What is 1 + 1?")
    assert task_prompts(str(file), 5).prompts[0][0]["role"] == "user"
    save_prepared(prepare(load_rows(str(file)), PrepareSettings(negatives="none", num_auxiliary=0)), tmp_path / "p", {})
    assert task_prompts(str(tmp_path / "p"), 5).golds == ("2",)
    file.write_text(json.dumps({"question": "", "answer": ""}) + "\n")
    with pytest.raises(ValueError, match=r"none of the 1 rows of rows\.jsonl can be read: 1 x "):
        task_prompts(str(file), 5)
