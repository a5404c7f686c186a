"""Greedy replies to prompts with transformers' `generate`, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unisd.batch import padded
from unisd.generation.decoding import end_token_ids, own_distribution
from unisd.modules import model_device, scoring_mode
from unisd.turns import Prompt, encode_prompt


def greedy_replies(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], *, max_new_tokens: int, batch_size: int = 16
) -> list[str]:
    """The most probable continuation of each prompt, token by token, without special tokens.

    Each token is the argmax of the model's logits: penalties, minimum lengths, forbidden or forced tokens, beams and
    the like of `model.generation_config` are left out; of it, only the token ids count. The tokenizer's EOS ends a
    reply too.

    Args:
        model: has `generate`; left in the mode it was in.
        tokenizer: with a chat template where prompts are conversations.
        prompts: strings or lists of messages.
        max_new_tokens: a reply that has not ended by then is cut off.
        batch_size: prompts generated together; similar lengths are put together.

    Raises:
        ValueError: `batch_size` or `max_new_tokens` below 1, or no padding and no EOS token to pad with.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(f"batch_size and max_new_tokens must be at least 1, got {batch_size} and {max_new_tokens}.")
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if padding is None:
        raise ValueError("the tokenizer has neither a padding nor an EOS token; set tokenizer.pad_token.")
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda place: len(encoded[place]))
    replies = [""] * len(encoded)
    device = model_device(model)
    ending = end_token_ids(model, tokenizer)
    with scoring_mode(model), own_distribution(model):
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            # On the left, so that every reply starts at the same position.
            input_ids, attention_mask = padded([encoded[place] for place in places], padding, "left")
            output = model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=ending or None,
                pad_token_id=padding,
            )
            texts = tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
            for place, text in zip(places, texts, strict=True):
                replies[place] = text
    return replies
