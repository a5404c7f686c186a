"""Replies with transformers' `generate`: batched, padded on the left, similar lengths together, with a key/value cache.

A token is drawn by adding Gumbel noise to the scaled logits and taking the largest: a sample of the softmax, from noise
that belongs to the request. So a reply depends on its prompt and seed, not on what else is in its batch (but for the
rounding of the logits).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from unisd.batch import padded
from unisd.generation.decoding import end_token_ids, own_distribution
from unisd.generation.interface import Request, Sampling
from unisd.modules import model_device, scoring_mode
from unisd.turns import Prompt, encode_prompt


class TransformersGenerator:
    """A model in this process.

    Args:
        model: has `generate`; left in the mode it was in.
        tokenizer: with a chat template where prompts are conversations.
        batch_size: prompts generated together.

    Raises:
        ValueError: `batch_size` below 1, or no padding and no EOS token to pad with.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 16) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if padding is None:
            raise ValueError("the tokenizer has neither a padding nor an EOS token; set tokenizer.pad_token.")
        self.batch_size = batch_size
        self._model, self._tokenizer, self._padding = model, tokenizer, padding

    @property
    def identity(self) -> str:
        """Class, settings and a digest of some numbers of every weight."""
        digest = hashlib.sha256(f"{self._model.config.to_json_string()}{self._tokenizer.chat_template}".encode())
        for name, parameter in sorted(self._model.named_parameters()):
            numbers = parameter.detach().flatten()[:: max(1, parameter.numel() // 16)]
            digest.update(f"{name}{tuple(parameter.shape)}{numbers.float().tolist()}".encode())
        return f"transformers:{type(self._model).__name__}:{digest.hexdigest()}"

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Similar lengths together, the longest first: where memory runs out, it does so at once."""
        lengths = [len(encode_prompt(self._tokenizer, request.prompt)) for request in requests]
        order = sorted(range(len(requests)), key=lambda place: -lengths[place])
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def replies(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, str]]:
        for places in self.batches(requests):
            yield from zip(places, self._batch([requests[place] for place in places], sampling), strict=True)

    def _batch(self, requests: Sequence[Request], sampling: Sampling) -> list[str]:
        encoded = [encode_prompt(self._tokenizer, request.prompt) for request in requests]
        # On the left, so that every reply starts at the same position.
        input_ids, attention_mask = padded(encoded, self._padding, "left")
        device = model_device(self._model)
        processors = LogitsProcessorList()
        if sampling.temperature > 0:
            processors.append(_OwnNoise([request.seed for request in requests], sampling, device))
        with scoring_mode(self._model), own_distribution(self._model):
            output = self._model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                max_new_tokens=sampling.max_new_tokens,
                do_sample=False,
                eos_token_id=end_token_ids(self._model, self._tokenizer) or None,
                pad_token_id=self._padding,
                logits_processor=processors,
            )
        return self._tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)


class _OwnNoise(LogitsProcessor):
    """Scores [B, V] whose largest is a sample at the temperature, from a generator for each row."""

    def __init__(self, seeds: Sequence[int], sampling: Sampling, device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._temperature = sampling.temperature
        self._top_p = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float() / self._temperature
        if self._top_p is not None:
            scores = self._top_p(input_ids, scores)
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()  # minus the logarithm of an exponential variable is a Gumbel variable


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
    sampling = Sampling(temperature=0.0, max_new_tokens=max_new_tokens)
    generator = TransformersGenerator(model, tokenizer, batch_size)
    replies = [""] * len(prompts)
    for place, reply in generator.replies([Request(prompt) for prompt in prompts], sampling):
        replies[place] = reply
    return replies
