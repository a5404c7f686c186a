"""Perplexity of given completions: how probable the model finds a reference answer after a prompt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from unisd.completions import encode_pairs, hidden_rows, scoring_batches
from unisd.modules import model_device, model_head, scoring_mode
from unisd.turns import Prompt
from unisd_kernels import linear_logprobs


@dataclass(frozen=True)
class CompletionScores:
    """Log-likelihood of completions under one model.

    Attributes:
        nll: minus the log-probability of each completion, in nats, summed over its tokens.
        num_tokens: tokens of each completion (EOS included where it was scored).
    """

    nll: tuple[float, ...]
    num_tokens: tuple[int, ...]

    @property
    def mean_nll(self) -> float:
        """Nats a token over all completions together; NaN where there is none."""
        return sum(self.nll) / sum(self.num_tokens) if self.num_tokens else math.nan

    @property
    def perplexity(self) -> float:
        """`exp(mean_nll)`: every token counts the same, so long completions weigh more."""
        return math.exp(self.mean_nll)

    def select(self, places: Iterable[int]) -> CompletionScores:
        """The scores of some of the completions."""
        chosen = list(places)
        return CompletionScores(
            tuple(self.nll[place] for place in chosen), tuple(self.num_tokens[place] for place in chosen)
        )


def completion_scores(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    *,
    batch_size: int = 8,
    include_eos: bool = True,
    impl: str | None = None,
) -> CompletionScores:
    """Score each completion after its prompt, at temperature 1.

    Only completion tokens count, the EOS token that ends the reply among them unless `include_eos=False`. The
    vocabulary-sized logits never exist as a whole (`unisd_kernels.linear_logprobs`). The model is left in the mode it
    was in.

    Args:
        model: causal language model, or a PEFT model of one (scored with its adapter).
        tokenizer: with a chat template where prompts are conversations.
        prompts: strings or lists of messages.
        completions: one text a prompt.
        batch_size: pairs in one forward pass.
        include_eos: whether ending the reply is part of it.
        impl: of `linear_logprobs`.

    Raises:
        ValueError: prompts and completions that do not pair up, an empty one, a model without a separate backbone.
    """
    pairs = encode_pairs(tokenizer, prompts, completions, include_eos=include_eos)
    nll = [math.nan] * len(pairs)
    with scoring_mode(model):
        head = model_head(model)
        for batch in scoring_batches(pairs, batch_size, model_device(model)):
            logprobs = linear_logprobs(hidden_rows(model, batch), head, batch.target_ids, impl=impl).logprobs
            for index, part in zip(batch.indices, logprobs.double().split(batch.lengths), strict=True):
                nll[index] = -part.sum().item()
    return CompletionScores(tuple(nll), tuple(len(pair.completion_ids) for pair in pairs))
