"""Greedy replies: the argmax continuation, whatever the batching."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from unisd.evaluation.generation import greedy_replies

PROMPTS = ["a", [{"role": "user", "content": "Hello there, how are you?"}], "some text in between"]


def argmax_reply(model: Any, tokenizer: Any, ids: list[int], max_new_tokens: int) -> str:
    reply: list[int] = []
    with torch.no_grad():
        for _ in range(max_new_tokens):
            token = model(torch.tensor([ids + reply])).logits[0, -1].argmax().item()
            reply.append(token)
            if token == tokenizer.eos_token_id:
                break
    return tokenizer.decode(reply, skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_replies_are_the_argmax_continuations(model: Any, tokenizer: Any, batch_size: int) -> None:
    text = tokenizer.apply_chat_template(PROMPTS[1], add_generation_prompt=True, tokenize=False)
    prompt_ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in (PROMPTS[0], text, PROMPTS[2])]
    expected = [argmax_reply(model, tokenizer, ids, 6) for ids in prompt_ids]
    assert greedy_replies(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=batch_size) == expected


def test_sampling_settings_of_the_model_are_ignored(model: Any, tokenizer: Any) -> None:
    expected = greedy_replies(model, tokenizer, PROMPTS, max_new_tokens=6)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.top_k = 3
    assert greedy_replies(model, tokenizer, PROMPTS, max_new_tokens=6) == expected


def test_the_mode_is_restored(model: Any, tokenizer: Any) -> None:
    model.train()
    greedy_replies(model, tokenizer, ["a"], max_new_tokens=1)
    assert model.training


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"max_new_tokens": 1, "batch_size": 0}])
def test_wrong_sizes_are_refused(model: Any, tokenizer: Any, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        greedy_replies(model, tokenizer, ["a"], **options)
