"""Hidden states of given completions after their prompts, as packed rows.

What is scored is teacher-forced text, so the batches are padded on the right: positions then start at 0 in every row
without position ids, and a causal model cannot see the padding. Logits are left to `unisd_kernels`.

    batch = completion_batch(tokenizer, prompts, completions)  # B pairs, N completion tokens
    hidden = hidden_rows(model, batch)  # [N, H]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from unisd.batch import padded
from unisd.modules import backbone
from unisd.turns import Prompt, encode_prompt, reply_end_ids
from unisd_kernels import pack_rows


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of a prompt (as the model would see it when generating) and of a completion."""

    prompt_ids: list[int]
    completion_ids: list[int]


@dataclass(frozen=True)
class CompletionBatch:
    """B right-padded pairs.

    Attributes:
        indices: place of each pair in the sequence that was batched.
        input_ids, attention_mask: [B, L].
        predicts: [B, L] bool, True at the positions whose next token is a completion token.
        target_ids: [N], those next tokens, sequence by sequence.
        lengths: completion tokens of each pair; they sum to N.
    """

    indices: list[int]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    predicts: torch.Tensor
    target_ids: torch.Tensor
    lengths: list[int]

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """[B + 1] int32, where the completion tokens of each pair begin and end among the N."""
        return nn.functional.pad(self.predicts.sum(1), (1, 0)).cumsum(0, dtype=torch.int32)


def completion_batch(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    *,
    include_eos: bool = True,
    device: torch.device | str = "cpu",
) -> CompletionBatch:
    """One batch of pairs in the order given, see `encode_pairs`."""
    pairs = encode_pairs(tokenizer, prompts, completions, include_eos=include_eos)
    return _batch(pairs, list(range(len(pairs))), device)


def encode_pairs(
    tokenizer: Any, prompts: Sequence[Prompt], completions: Sequence[str], *, include_eos: bool = True
) -> list[EncodedPair]:
    """Ids of each pair; the completion is tokenized by itself and ends as a reply does if `include_eos`: with the token
    that closes the template's turn for a conversation, with EOS for a string (`unisd.turns`).

    Raises:
        ValueError: not as many completions as prompts, a pair without a token in one of them, or no token to end with.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"got {len(prompts)} prompts and {len(completions)} completions; they must pair up.")
    endings: dict[bool, list[int]] = {}  # strings and conversations end differently; each is looked up once
    pairs = []
    for place, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        plain = isinstance(prompt, str)
        if plain not in endings:
            endings[plain] = reply_end_ids(tokenizer, prompt) if include_eos else []
        if include_eos and not endings[plain]:
            raise ValueError("the tokenizer has no EOS token; set tokenizer.eos_token or pass include_eos=False.")
        pair = EncodedPair(
            encode_prompt(tokenizer, prompt),
            [*tokenizer(completion, add_special_tokens=False)["input_ids"], *endings[plain]],
        )
        if not pair.prompt_ids or not pair.completion_ids:
            raise ValueError(
                f"pair {place} has {len(pair.prompt_ids)} prompt and {len(pair.completion_ids)} completion tokens; "
                "both need at least one (the first completion token is predicted from the last prompt token)."
            )
        pairs.append(pair)
    return pairs


def scoring_batches(
    pairs: Sequence[EncodedPair], batch_size: int, device: torch.device | str = "cpu"
) -> Iterator[CompletionBatch]:
    """Batches of at most `batch_size` pairs, similar lengths together (less padding)."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    order = sorted(range(len(pairs)), key=lambda place: len(pairs[place].prompt_ids) + len(pairs[place].completion_ids))
    for start in range(0, len(order), batch_size):
        yield _batch(pairs, order[start : start + batch_size], device)


def hidden_rows(model: Any, batch: CompletionBatch) -> torch.Tensor:
    """[N, H] hidden states (after the final norm) from which `batch.target_ids` are predicted.

    Raises:
        ValueError: a model whose backbone cannot be run without its head, or a prompt-learning adapter (it would be
            left out silently).
    """
    output = backbone(model)(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return pack_rows(batch.predicts, output.last_hidden_state)[0]


def _batch(pairs: Sequence[EncodedPair], indices: list[int], device: torch.device | str) -> CompletionBatch:
    """The pairs at some places, padded on the right."""
    chosen = [pairs[index] for index in indices]
    # Any id serves as padding: it is masked, and no valid position comes after it.
    input_ids, attention_mask = padded([pair.prompt_ids + pair.completion_ids for pair in chosen], 0, "right")
    predicts = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, pair in enumerate(chosen):
        first = len(pair.prompt_ids) - 1
        predicts[row, first : first + len(pair.completion_ids)] = True
    targets = torch.tensor([token for pair in chosen for token in pair.completion_ids])
    return CompletionBatch(
        indices=list(indices),
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        predicts=predicts.to(device),
        target_ids=targets.to(device),
        lengths=[len(pair.completion_ids) for pair in chosen],
    )
