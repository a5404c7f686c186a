"""Retention: KL to the base and perplexities on the chat probe."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from unisd.data.chat_probe import CHAT_PROBE
from unisd.evaluation import completion_scores, evaluate_retention

PROBE = CHAT_PROBE[:5]


def dense_kl(base: Any, trained: Any, tokenizer: Any, item: Any) -> torch.Tensor:
    """KL(base || trained) at each answer token, from full logits of one sequence."""
    text = tokenizer.apply_chat_template(item["prompt"], add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = [*tokenizer(item["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        p, q = (torch.log_softmax(net(ids).logits[0, len(prompt) - 1 : -1].double(), -1) for net in (base, trained))
    return (p.exp() * (p - q)).sum(-1)


def test_equals_the_dense_computation(model: Any, other_model: Any, tokenizer: Any) -> None:
    scores = evaluate_retention(other_model, tokenizer, base_model=model, probe=PROBE, batch_size=2)
    kl = [dense_kl(model, other_model, tokenizer, item) for item in PROBE]
    assert scores.kl == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)
    assert scores.kl_by_prompt == pytest.approx([part.mean().item() for part in kl], rel=1e-4)
    assert scores.num_tokens == sum(len(part) for part in kl)
    prompts, answers = [item["prompt"] for item in PROBE], [item["completion"] for item in PROBE]
    assert scores.base_perplexity == pytest.approx(completion_scores(model, tokenizer, prompts, answers).perplexity)
    assert scores.trained_perplexity == pytest.approx(
        completion_scores(other_model, tokenizer, prompts, answers).perplexity
    )


def test_a_peft_model_is_compared_with_its_base(lora_model: Any, tokenizer: Any) -> None:
    base = copy.deepcopy(lora_model).unload()
    scores = evaluate_retention(lora_model, tokenizer, probe=PROBE)
    assert scores.kl > 1e-3
    copied = evaluate_retention(lora_model, tokenizer, base_model=base, probe=PROBE)
    # Not to the last bit: with its own base the model shares one head, which is scored more exactly.
    assert scores.kl == pytest.approx(copied.kl, rel=1e-5)
    assert scores.kl_by_prompt == pytest.approx(copied.kl_by_prompt, rel=1e-4)
    # The adapter is on again afterwards.
    ids = torch.tensor([[5, 6, 7]])
    assert not torch.allclose(lora_model(ids).logits, base(ids).logits)


def test_an_untouched_model_has_lost_nothing(model: Any, tokenizer: Any) -> None:
    scores = evaluate_retention(copy.deepcopy(model), tokenizer, base_model=model, probe=PROBE)
    assert scores.kl == pytest.approx(0.0, abs=1e-6)
    assert scores.trained_perplexity == pytest.approx(scores.base_perplexity)


def test_a_model_without_a_base_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="base_model"):
        evaluate_retention(model, tokenizer, probe=PROBE)
    with pytest.raises(ValueError, match="empty"):
        evaluate_retention(model, tokenizer, base_model=model, probe=[])


def test_the_table_shows_the_numbers(model: Any, other_model: Any, tokenizer: Any) -> None:
    scores = evaluate_retention(other_model, tokenizer, base_model=model, probe=PROBE)
    for number in (
        f"{scores.kl:.5f}",
        f"{scores.base_perplexity:.3f}",
        f"{scores.trained_perplexity:.3f}",
        "5 prompts",
    ):
        assert number in scores.table()
    assert all(math.isfinite(value) for value in scores.as_dict().values())


def test_the_probe_is_what_it_should_be() -> None:
    questions = [item["prompt"][-1]["content"] for item in CHAT_PROBE]
    assert len(questions) == len(set(questions)) == 24
    for item in CHAT_PROBE:
        assert [message["role"] for message in item["prompt"]] == ["user"]
        assert 0 < len(item["completion"]) < 200
        assert "Answer:" not in item["completion"], "nothing of the training task"
