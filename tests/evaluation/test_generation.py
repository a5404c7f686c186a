"""Greedy replies: the argmax continuation, whatever the batching."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from unisd.generation import greedy_replies

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


# Every setting of a generation config that moves a greedy reply of the tiny model off its argmax.
UNWANTED = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 0.1,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[token] for token in range(0, 258, 2)],
    "suppress_tokens": list(range(0, 258, 2)),
    "begin_suppress_tokens": list(range(0, 258, 2)),
    "forced_eos_token_id": 7,
    "min_new_tokens": 12,
    "min_length": 200,
    "exponential_decay_length_penalty": (1, 1e30),
    "sequence_bias": [[[9], 1e6]],
    "guidance_scale": 9.0,
    "watermarking_config": {"bias": 1e3, "greenlist_ratio": 0.1},
    "num_beams": 8,
    "do_sample": True,
    "prompt_lookup_num_tokens": 3,
    "stop_strings": ["a"],
    "max_time": 0.0,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "return_dict_in_generate": True,
    "num_return_sequences": 2,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
}
LENGTH = 10


@pytest.mark.parametrize("wrapped", [False, True])
def test_greedy_is_the_argmax_whatever_the_generation_config_asks_for(
    model: Any, lora_model: Any, tokenizer: Any, wrapped: bool
) -> None:
    from transformers import GenerationConfig

    subject = lora_model if wrapped else model
    prompts = ["a", "some text"]
    expected = [argmax_reply(subject, tokenizer, tokenizer(text)["input_ids"], LENGTH) for text in prompts]
    for name, value in UNWANTED.items():
        given = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1)
        setattr(given, name, value)  # checked by none of the setters, as in a file of a checkpoint
        subject.generation_config = given
        if wrapped:
            subject.get_base_model().generation_config = given
        assert greedy_replies(subject, tokenizer, prompts, max_new_tokens=LENGTH) == expected, name
        assert subject.generation_config is given
        assert getattr(given, name) == value
        assert not wrapped or subject.get_base_model().generation_config is given


def test_these_settings_would_change_a_reply(model: Any, tokenizer: Any) -> None:
    """Without the neutral config the test above means nothing."""
    ids = torch.tensor([tokenizer("a")["input_ids"]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": LENGTH, "do_sample": False}
    plain = model.generate(ids, **options)
    for name in ("repetition_penalty", "no_repeat_ngram_size", "suppress_tokens", "sequence_bias", "bad_words_ids"):
        model.generation_config = type(model.generation_config)(
            eos_token_id=1, pad_token_id=1, **{name: UNWANTED[name]}
        )
        other = model.generate(ids, **options)
        assert plain.shape != other.shape or not torch.equal(plain, other), name


def test_each_id_that_ends_a_text_ends_a_reply(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("a")["input_ids"]
    whole = argmax_reply(model, tokenizer, ids, LENGTH)
    tokens = tokenizer(whole, add_special_tokens=False)["input_ids"]
    for ending in (tokens[2], [tokens[2], 5]):
        model.generation_config.eos_token_id = ending
        (reply,) = greedy_replies(model, tokenizer, ["a"], max_new_tokens=LENGTH)
        assert tokenizer(reply, add_special_tokens=False)["input_ids"] == tokens[: tokens.index(tokens[2]) + 1]
    tokenizer = _with_eos(tokenizer, tokens[1])
    (reply,) = greedy_replies(model, tokenizer, ["a"], max_new_tokens=LENGTH)
    assert len(tokenizer(reply, add_special_tokens=False)["input_ids"]) <= tokens.index(tokens[1]) + 1


def _with_eos(tokenizer: Any, token: int) -> Any:
    import copy

    changed = copy.deepcopy(tokenizer)
    changed.eos_token = tokenizer.convert_ids_to_tokens(token)
    return changed
