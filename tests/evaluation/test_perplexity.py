"""Perplexity against the dense computation, whatever the batching."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unisd.evaluation import completion_scores

TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def dense_nll(model: Any, tokenizer: Any, prompt: Any, completion: str, *, include_eos: bool = True) -> float:
    """Minus the log-probability of the completion, from full logits of one unpadded sequence in float64."""
    if isinstance(prompt, str):
        prompt_ids = tokenizer(prompt)["input_ids"]
    else:
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    completion_ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    completion_ids = completion_ids + [tokenizer.eos_token_id] * include_eos
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + completion_ids])).logits[0].double()
    log_probs = torch.log_softmax(logits, dim=-1)
    return -sum(log_probs[len(prompt_ids) - 1 + place, token].item() for place, token in enumerate(completion_ids))


PROMPTS = [chat("2 + 2?"), chat("Tell me a long story about the sea, please."), "plain text", chat("hi")]
COMPLETIONS = ["Four.", "No.", " and so on, and so on, and so on", "x"]


@pytest.mark.parametrize("include_eos", [True, False])
def test_equals_the_dense_log_softmax(model: Any, tokenizer: Any, include_eos: bool) -> None:
    scores = completion_scores(model, tokenizer, PROMPTS, COMPLETIONS, include_eos=include_eos)
    expected = [
        dense_nll(model, tokenizer, prompt, completion, include_eos=include_eos)
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    assert scores.nll == pytest.approx(expected, rel=1e-5)
    tokens = sum(len(completion) + include_eos for completion in COMPLETIONS)
    assert sum(scores.num_tokens) == tokens
    assert scores.perplexity == pytest.approx(math.exp(sum(expected) / tokens), rel=1e-5)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5), batch_size=st.integers(1, 5))
def test_batching_and_padding_change_nothing(
    model: Any, tokenizer: Any, pairs: list[tuple[str, str]], batch_size: int
) -> None:
    prompts, completions = [chat(question) for question, _ in pairs], [answer for _, answer in pairs]
    together = completion_scores(model, tokenizer, prompts, completions, batch_size=batch_size)
    alone = [
        completion_scores(model, tokenizer, [prompt], [completion]).nll[0]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    assert together.nll == pytest.approx(alone, rel=1e-4)


def test_prompt_tokens_do_not_count(model: Any, tokenizer: Any) -> None:
    scores = completion_scores(model, tokenizer, [chat("a" * 50)], ["bcd"])
    assert scores.num_tokens == (4,)
    assert scores.nll[0] < 40 * 4


def test_an_adapter_is_part_of_the_model(lora_model: Any, tokenizer: Any) -> None:
    adapted = completion_scores(lora_model, tokenizer, PROMPTS, COMPLETIONS)
    expected = [dense_nll(lora_model, tokenizer, *pair) for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert adapted.nll == pytest.approx(expected, rel=1e-5)
    with lora_model.disable_adapter():
        assert completion_scores(lora_model, tokenizer, PROMPTS, COMPLETIONS).nll != pytest.approx(expected, rel=1e-3)


def test_the_model_is_left_as_it_was(model: Any, tokenizer: Any) -> None:
    model.train()
    model.model.layers[0].eval()
    completion_scores(model, tokenizer, ["a"], ["b"])
    assert model.training
    assert model.model.layers[1].training
    assert not model.model.layers[0].training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_selection_is_by_place(model: Any, tokenizer: Any) -> None:
    scores = completion_scores(model, tokenizer, PROMPTS, COMPLETIONS)
    chosen = scores.select([2, 0])
    assert chosen.nll == (scores.nll[2], scores.nll[0])
    assert chosen.perplexity == pytest.approx(math.exp(sum(chosen.nll) / sum(chosen.num_tokens)))


@pytest.mark.parametrize(
    ("prompts", "completions", "options", "message"),
    [
        (["a"], [], {}, "1 prompts and 0 completions"),
        (["a", "b"], ["c", ""], {"include_eos": False}, "pair 1"),
        ([""], ["c"], {}, "0 prompt"),
        (["a"], ["c"], {"batch_size": 0}, "batch_size"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    model: Any, tokenizer: Any, prompts: list[str], completions: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        completion_scores(model, tokenizer, prompts, completions, **options)


def test_prompt_learning_adapters_are_refused(model: Any, tokenizer: Any) -> None:
    """Running the backbone alone would leave their virtual tokens out without a word."""
    from peft import PromptTuningConfig, get_peft_model

    peft_model = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="prompt-learning"):
        completion_scores(peft_model, tokenizer, ["a"], ["b"])
