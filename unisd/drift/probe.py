"""Drift of the model from its base, measured on a small fixed probe.

    drift = mean over the tokens of the probe's answers of KL(p_base || p_now)     (nats a token, temperature 1)

The probe is a fixed list of everyday prompts with reference answers, unrelated to the training data; both models read
the same tokens, nothing is sampled. Zero before training. It rises slowly while a model learns its task and fast when
it collapses or forgets, some hundred steps before a benchmark shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from unisd.batch import padded
from unisd.head import gathered_head
from unisd.modules import HiddenStates, evaluating, head_is_trained, is_peft, model_head
from unisd.sharding import adapter_off
from unisd.turns import Prompt
from unisd_kernels import LMHead, linear_divergence, pack_rows


@dataclass(frozen=True)
class _Batch:
    """Ids and masks of B items: [B, L] padded on the left, [B, T] padded on the right."""

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor


class DriftProbe:
    """Measurement of the drift of one model from its base.

    The base's hidden states of the probe are computed once and kept on the CPU (H entries a token in the model's dtype:
    64 MB for 4,000 tokens, H = 4096 and float32). With a PEFT model the base is always at hand (adapter off), so that
    happens at the first measurement. A fully fine-tuned model loses its base, so `capture` must be called before
    training; where its head is trained too, the base's head is copied to the CPU (V H entries in the model's
    dtype), else the live head is the base's.

    Args:
        probe: items `{"prompt": str or messages, "completion": str}`.
        tokenize_prompts: list of prompts to lists of ids (chat template included).
        tokenize_completion: one answer to ids, without special tokens.
        reply_end_ids: the ids that end the reply to a prompt (`unisd.turns`), appended to its answer.
        pad_token_id: for padding.
        hidden_states: see `unisd.modules.HiddenStates`.
        batch_size: items per forward pass.
        impl, workspace_bytes: as in `unisd_kernels`.

    Raises:
        ValueError: an empty probe, or an item without the two keys.
    """

    def __init__(
        self,
        probe: Sequence[Mapping[str, Any]],
        *,
        tokenize_prompts: Callable[[list[Prompt]], list[list[int]]],
        tokenize_completion: Callable[[str], list[int]],
        reply_end_ids: Callable[[Prompt], list[int]],
        pad_token_id: int,
        hidden_states: HiddenStates,
        batch_size: int = 8,
        impl: str | None = None,
        workspace_bytes: int | None = None,
    ) -> None:
        if not probe:
            raise ValueError("drift_probe is empty; give items {'prompt': ..., 'completion': ...}")
        for position, item in enumerate(probe):
            missing = {"prompt", "completion"} - set(item)
            if missing:
                raise ValueError(f"item {position} of drift_probe has no {sorted(missing)[0]!r}, only {sorted(item)}")
        self._hidden_states = hidden_states
        self._options: dict[str, Any] = {"impl": impl, "workspace_bytes": workspace_bytes}
        self._batches: list[_Batch] = []
        for start in range(0, len(probe), batch_size):
            items = probe[start : start + batch_size]
            # One call a prompt: a probe may mix strings and conversations, a batch for the tokenizer may not.
            prompts = [tokenize_prompts([item["prompt"]])[0] for item in items]
            completions = [[*tokenize_completion(item["completion"]), *reply_end_ids(item["prompt"])] for item in items]
            self._batches.append(
                _Batch(
                    *padded(prompts, pad_token_id, "left"),
                    *padded(completions, pad_token_id, "right"),
                )
            )
        self._base_hidden: list[torch.Tensor] = []
        self._base_head: LMHead | None = None  # None: the live head is the base's

    @property
    def num_tokens(self) -> int:
        """Tokens the mean is over."""
        return sum(int(batch.completion_mask.sum()) for batch in self._batches)

    def loses_base(self, model: nn.Module) -> bool:
        """Whether training overwrites the base, so that `capture` has to come before it."""
        return not is_peft(model)

    @torch.no_grad()
    def capture(self, model: nn.Module) -> None:
        """Store the base's side of the comparison.

        Args:
            model: a PEFT model, whose adapter is switched off meanwhile, or a model that is still the base.
        """
        device = _device(model)
        base: AbstractContextManager[Any] = adapter_off(model) if is_peft(model) else nullcontext()
        trained = head_is_trained(model)
        with base, evaluating(model):
            self._base_hidden = [hidden.cpu() for hidden in self._rows(model, device)]
            if trained:
                with gathered_head(model):
                    head = model_head(model)
                    bias = None if head.bias is None else head.bias.detach().to("cpu", copy=True)
                    weight = head.weight.detach().to("cpu", copy=True)
                    self._base_head = replace(head, weight=weight, bias=bias)

    @torch.no_grad()
    def measure(self, model: nn.Module) -> float:
        """Mean KL(p_base || p_now) in nats a token.

        Args:
            model: the model now, unwrapped, of the same architecture as the captured base.

        Raises:
            RuntimeError: a model without an adapter for which `capture` was not called.
        """
        if not self._base_hidden:
            if self.loses_base(model):
                raise RuntimeError("DriftProbe.capture(model) must be called before training a model without adapter")
            self.capture(model)
        total, count = 0.0, 0
        device = _device(model)
        with evaluating(model):
            batches = self._rows(model, device)
            for base_hidden, hidden in zip(self._base_hidden, batches, strict=True):
                with gathered_head(model):
                    head = model_head(model).detach()
                    base_head = head if self._base_head is None else _moved(self._base_head, head)
                    divergence = linear_divergence(
                        hidden, head, base_hidden.to(hidden), base_head, beta=0.0, temperature=1.0, **self._options
                    )
                total += float(divergence.double().sum())
                count += divergence.numel()
        return total / max(count, 1)

    def _rows(self, model: nn.Module, device: torch.device) -> Iterator[torch.Tensor]:
        """Hidden states [N, H] of the answer tokens, for each batch of the probe."""
        for batch in self._batches:
            ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1).to(device)
            mask = torch.cat([batch.prompt_mask, batch.completion_mask], dim=1).to(device)
            hidden = self._hidden_states(model, ids, mask, batch.completion_ids.shape[1])
            yield pack_rows(batch.completion_mask.to(hidden.device), hidden)[0]


def default_probe(has_chat_template: bool) -> list[dict[str, Any]]:
    """The package's own probe: `unisd.data.chat_probe`, as plain text for a tokenizer without a chat template."""
    from unisd.data.chat_probe import CHAT_PROBE

    if has_chat_template:
        return list(CHAT_PROBE)
    texts = ["\n".join(message["content"] for message in item["prompt"]) for item in CHAT_PROBE]
    return [{"prompt": f"{text}\n", "completion": item["completion"]} for text, item in zip(texts, CHAT_PROBE)]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _moved(head: LMHead, like: LMHead) -> LMHead:
    bias = None if head.bias is None else head.bias.to(like.weight)
    return replace(head, weight=head.weight.to(like.weight), bias=bias)
