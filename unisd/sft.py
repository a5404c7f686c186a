"""Supervised fine-tuning as a baseline: the same run, but the completions are the gold demonstrations, and the loss is
their cross-entropy at temperature 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from unisd.turns import Prompt, reply_end_ids
from unisd_kernels import LinearLogProbs, UniSDLoss
from unisd_kernels.reference.loss import reduce_per_token


def demonstration_ids(
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[Prompt],
    tokenizer: Any,
    chat_template: str | None,
    template_options: Mapping[str, Any],
) -> list[list[int]]:
    """Ids of each row's demonstration with the tokens that end a reply.

    Args:
        prompts: of the rows, as they are read.
    """
    endings: dict[bool, list[int]] = {}
    ids = []
    for row, prompt in zip(rows, prompts, strict=True):
        plain = isinstance(prompt, str)
        if plain not in endings:
            endings[plain] = reply_end_ids(tokenizer, prompt, chat_template, template_options)
        text = tokenizer(row["demonstration"], add_special_tokens=False)["input_ids"]
        ids.append([*text, *endings[plain]])
    return ids


def supervised_loss(
    scores: LinearLogProbs, cu_seqlens: torch.Tensor, normalization: str, num_items: torch.Tensor | None
) -> UniSDLoss:
    """Cross-entropy of N tokens as the result of a step; what belongs to a teacher is None.

    Args:
        scores: of the demonstrations' tokens, with their graph.
        cu_seqlens: [B + 1].
        normalization, num_items: as in `unisd_kernels.unisd_loss`.
    """
    loss = reduce_per_token(-scores.logprobs, cu_seqlens, normalization)
    local = cu_seqlens.numel() - 1 if normalization == "sequence" else scores.logprobs.numel()
    loss = loss if num_items is None else loss * (local / num_items)
    zero = loss.detach().new_zeros(())
    entropy = None if scores.entropy is None else scores.entropy.detach()
    statistics = dict.fromkeys(UniSDLoss._fields[4:])
    return UniSDLoss(
        loss,
        zero,
        zero,
        zero,
        **{**statistics, "student_logprobs": scores.logprobs.detach(), "student_entropy": entropy},
    )
