"""Drift on the two models' own completions, against dense logits."""

import copy
import json
import math
import statistics

import pytest
import torch

from unisd.cli import main
from unisd.evaluation.drift import evaluate_drift
from unisd.generation import greedy_replies

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
