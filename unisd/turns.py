"""Both ends of a turn: the ids of a prompt, up to where the reply begins, and those with which a reply ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Prompt = str | Sequence[dict[str, Any]]
"""A plain string, or the messages of a conversation."""

_CONTENT = "unisd turn content"


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Ids of a prompt: a string as it is, messages through the chat template, up to where the reply begins."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    encoded = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


def as_prompt(text: str, chats: bool) -> Prompt:
    """A text as a user's message for a model that chats, else as it is."""
    return [{"role": "user", "content": text}] if chats else text


def readable(tokenizer: Any, prompt: Prompt) -> Prompt:
    """The prompt as the tokenizer can read it: messages as plain text where there is no chat template."""
    if isinstance(prompt, str) or getattr(tokenizer, "chat_template", None) is not None:
        return prompt
    return "\n".join(str(message["content"]) for message in prompt) + "\n"


def reply_end_ids(
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, Any]],
    chat_template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids after the last word of a reply, up to the one at which generation ends.

    For a conversation the template is rendered with an assistant's turn and cut after the turn's first special token
    (`<|im_end|>`, `<end_of_turn>`, ...); what the template writes after it (a newline, the EOS of the whole text) is
    nothing the model is asked for. Plain text, and a template that closes a turn without a special token, end with EOS.

    Args:
        tokenizer: with a chat template where the prompt is a conversation.
        prompt: a string or messages; only which of the two matters.
        chat_template, template_kwargs: for `apply_chat_template`, as when the prompts are tokenized.

    Returns:
        Ids; empty for a tokenizer without EOS where it would be needed.
    """
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if isinstance(prompt, str):
        return eos
    turns = [{"role": "user", "content": _CONTENT}, {"role": "assistant", "content": _CONTENT}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, chat_template=chat_template, **(template_kwargs or {}))
    # Only a template that shows the assistant's words can close its turn.
    if text.count(_CONTENT) < 2:
        return eos
    ids = tokenizer(text.rsplit(_CONTENT, 1)[1], add_special_tokens=False)["input_ids"]
    special = _special_ids(tokenizer)
    for place, token in enumerate(ids):
        if token in special:
            return list(ids[: place + 1])
    return eos


def _special_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}
