"""Retention: what training changed on chat that has nothing to do with the task.

Everything is teacher-forced on fixed reference answers, so it is exact, cheap, and needs no judge:

    kl = mean over answer tokens of KL(p_base || p_trained)     (nats; 0 if nothing changed)

and the perplexity of the answers under both models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unisd.completions import encode_pairs, hidden_rows, scoring_batches
from unisd.data.chat_probe import CHAT_PROBE
from unisd.evaluation.base import base_of
from unisd.modules import model_device, model_head, scoring_mode
from unisd.turns import readable
from unisd_kernels import LMHead, linear_divergence, linear_logprobs


@dataclass(frozen=True)
class RetentionScores:
    """Trained against base model on the probe.

    Attributes:
        kl: mean per-token KL(base || trained), nats.
        base_perplexity, trained_perplexity: of the reference answers, per token.
        num_tokens: answer tokens, EOS included.
        kl_by_prompt: the mean for each prompt, in the order of the probe.
    """

    kl: float
    base_perplexity: float
    trained_perplexity: float
    num_tokens: int
    kl_by_prompt: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """Dictionary for JSON, without `kl_by_prompt`."""
        return {
            "kl": self.kl,
            "base_perplexity": self.base_perplexity,
            "trained_perplexity": self.trained_perplexity,
            "num_tokens": self.num_tokens,
        }

    def table(self) -> str:
        """Plain text, one line a figure."""
        return "\n".join(
            [
                f"KL(base || trained), nats a token: {self.kl:.5f}",
                f"perplexity of the answers: base {self.base_perplexity:.3f}, trained {self.trained_perplexity:.3f}",
                f"over {len(self.kl_by_prompt)} prompts, {self.num_tokens} tokens",
            ]
        )


def evaluate_retention(
    model: Any,
    tokenizer: Any,
    *,
    base_model: Any = None,
    probe: Sequence[Mapping[str, Any]] = CHAT_PROBE,
    batch_size: int = 8,
    impl: str | None = None,
) -> RetentionScores:
    """Compare the trained model with its base on held-out chat.

    Args:
        model: the trained model; left in the mode it was in.
        tokenizer: of both.
        base_model: the model before training. With a PEFT model it may be left out: the base is then the same model
            with its adapter switched off.
        probe: items `{"prompt": messages, "completion": str}`.
        batch_size: items in one forward pass.
        impl: of `unisd_kernels`.

    Raises:
        ValueError: an empty probe, or no base to compare with.
    """
    if not probe:
        raise ValueError("probe is empty: there is nothing to compare on.")
    base, as_base = base_of(model, base_model)
    prompts = [readable(tokenizer, item["prompt"]) for item in probe]
    pairs = encode_pairs(tokenizer, prompts, [item["completion"] for item in probe])
    kl_by_prompt = [math.nan] * len(pairs)
    kl_sum = base_nll = trained_nll = 0.0
    num_tokens = 0
    with scoring_mode(model), scoring_mode(base):
        for batch in scoring_batches(pairs, batch_size, model_device(model)):
            trained_head, trained = model_head(model), hidden_rows(model, batch)
            with as_base():
                base_head, base_hidden = model_head(base), hidden_rows(base, batch)
            kl = linear_divergence(trained, trained_head, base_hidden, base_head, beta=0.0, impl=impl).double()
            for index, part in zip(batch.indices, kl.split(batch.lengths), strict=True):
                kl_by_prompt[index] = part.mean().item()
            kl_sum += kl.sum().item()
            trained_nll += _nll(trained, trained_head, batch.target_ids, impl)
            base_nll += _nll(base_hidden, base_head, batch.target_ids, impl)
            num_tokens += sum(batch.lengths)
    return RetentionScores(
        kl=kl_sum / num_tokens,
        base_perplexity=math.exp(base_nll / num_tokens),
        trained_perplexity=math.exp(trained_nll / num_tokens),
        num_tokens=num_tokens,
        kl_by_prompt=tuple(kl_by_prompt),
    )


def _nll(hidden: torch.Tensor, head: LMHead, target_ids: torch.Tensor, impl: str | None) -> float:
    """Summed negative log-likelihood of `target_ids` [N] after `hidden` [N, H], in nats."""
    return -linear_logprobs(hidden, head, target_ids, impl=impl).logprobs.double().sum().item()
