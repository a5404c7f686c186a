"""Accuracy and perplexity by number of steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from unisd.data.procedural import procedural_rows
from unisd.evaluation import completion_scores, evaluate_procedural

ROWS = procedural_rows(9, num_steps=(1, 2, 3), num_auxiliary=0)
BY_PROMPT = {row["prompt"][0]["content"]: row for row in ROWS}


def knowing(prompts: Sequence[Any]) -> list[str]:
    """Someone who knows the procedures: replies with the correct trace."""
    return [BY_PROMPT[prompt[0]["content"]]["completion"] for prompt in prompts]


def test_who_knows_the_answers_scores_full_marks(model: Any, tokenizer: Any) -> None:
    scores = evaluate_procedural(model, tokenizer, ROWS, generate=knowing, perplexity=False)
    assert [(one.num_steps, one.count, one.accuracy) for one in scores.by_steps] == [
        (1, 3, 1.0),
        (2, 3, 1.0),
        (3, 3, 1.0),
    ]
    assert (scores.overall.accuracy, scores.overall.answered, scores.overall.count) == (1.0, 1.0, 9)
    assert list(scores.replies) == [row["completion"] for row in ROWS]


def test_wrong_and_missing_answers_are_told_apart(model: Any, tokenizer: Any) -> None:
    def replies(prompts: Sequence[Any]) -> list[str]:
        right = knowing(prompts)
        return [right[0], right[1].rsplit("Answer", 1)[0], "Answer: 999"]

    scores = evaluate_procedural(model, tokenizer, ROWS, generate=replies, perplexity=False)
    for one in (*scores.by_steps, scores.overall):
        assert one.accuracy == pytest.approx(1 / 3)
        assert one.answered == pytest.approx(2 / 3)


def test_a_model_that_generates_the_answers_scores_full_marks(model: Any, tokenizer: Any, monkeypatch: Any) -> None:
    """The whole path through `generate`: a model that emits the correct trace, then EOS and padding."""

    def generate(*, input_ids: Any, attention_mask: Any, max_new_tokens: int, **options: Any) -> Any:
        import torch

        assert options["do_sample"] is False
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            text = tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
            trace = next(row["completion"] for question, row in BY_PROMPT.items() if question in text)
            reply = [*tokenizer(trace)["input_ids"], tokenizer.eos_token_id]
            assert len(reply) <= max_new_tokens, "the default limit leaves room for the correct reply"
            rows.append(reply + [tokenizer.pad_token_id] * (max_new_tokens - len(reply)))
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    scores = evaluate_procedural(model, tokenizer, ROWS, perplexity=False, batch_size=2)
    assert scores.overall.accuracy == 1.0


def test_an_untrained_model_scores_nothing(model: Any, tokenizer: Any) -> None:
    scores = evaluate_procedural(model, tokenizer, ROWS, perplexity=False, max_new_tokens=4)
    assert scores.overall.accuracy == 0.0
    assert len(scores.replies) == len(ROWS)


def test_perplexity_is_that_of_the_correct_replies(model: Any, tokenizer: Any) -> None:
    scores = evaluate_procedural(model, tokenizer, ROWS, accuracy=False, prompt_column="teacher_prompt")
    assert scores.overall.accuracy is None
    assert scores.replies == ()
    for one in (*scores.by_steps, scores.overall):
        rows = [row for row in ROWS if one.num_steps in (None, row["num_steps"])]
        expected = completion_scores(
            model, tokenizer, [row["teacher_prompt"] for row in rows], [row["completion"] for row in rows]
        )
        assert one.perplexity == pytest.approx(expected.perplexity, rel=1e-5)


def test_table_and_dictionary_show_every_number(model: Any, tokenizer: Any) -> None:
    scores = evaluate_procedural(model, tokenizer, ROWS, generate=knowing)
    header, *lines = scores.table().split("\n")
    assert header.split() == ["steps", "tasks", "accuracy", "answered", "perplexity"]
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "all"]
    for line, one in zip(lines, (*scores.by_steps, scores.overall), strict=True):
        assert one.perplexity is not None
        assert line.split()[1:] == [str(one.count), "100.0%", "100.0%", f"{one.perplexity:.3f}"]
    read = json.loads(json.dumps(scores.as_dict()))
    assert read["by_steps"][1]["num_steps"] == 2
    assert read["overall"]["accuracy"] == 1.0


def test_what_cannot_be_evaluated_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="empty"):
        evaluate_procedural(model, tokenizer, [])
    with pytest.raises(ValueError, match=r"row 0 lacks .*'answer'"):
        evaluate_procedural(model, tokenizer, [{"prompt": "a", "completion": "b", "num_steps": 1}])
    with pytest.raises(ValueError, match="auxiliary_prompt"):
        evaluate_procedural(model, tokenizer, ROWS, prompt_column="auxiliary_prompt")
