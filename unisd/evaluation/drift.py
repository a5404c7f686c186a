"""Drift on completions that the two models write themselves: of a task, or of general chat.

`unisd.evaluation.retention` looks at fixed answers. Here the tuned model's own greedy completions are read by the base
and the base's by the tuned model, at temperature 1 and without the token that ends them:

    forward perplexity   mean over prompts of exp(-mean log p_base(y_tuned))     how strange its replies are to the base
    reverse perplexity   mean over prompts of exp(-mean log p_tuned(y_base))     how strange the base's are to it now
    JSD                  mean over prompts of the mean over tokens of JSD(p_base, p_tuned), on both completions
    change of log p      log p_tuned - log p_base of the tokens of both

All from hidden states, by the kernels; no logits are held.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from unisd.completions import encode_pairs, hidden_rows, scoring_batches
from unisd.data.chat_probe import CHAT_PROBE
from unisd.evaluation.base import base_of
from unisd.evaluation.perplexity import completion_scores
from unisd.evaluation.task_prompts import TaskPrompts
from unisd.generation import greedy_replies
from unisd.modules import model_device, model_head, scoring_mode
from unisd.scoring import Interval, mean_interval
from unisd.turns import Prompt, readable
from unisd_kernels import linear_divergence, linear_logprobs

PERCENTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True)
class OwnCompletions:
    """Completions of one of the two models, read by both. One number a prompt, but for `changes`.

    Attributes:
        perplexity: under the other model.
        jsd: mean over tokens, nats.
        changes: log p_tuned - log p_base of every token.
        empty: completions without a token, which are left out.
    """

    perplexity: tuple[float, ...]
    jsd: tuple[float, ...]
    changes: tuple[float, ...]
    empty: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        ranked = sorted(self.perplexity)
        return {
            "perplexity": mean_interval(self.perplexity).as_dict(),
            "perplexity_percentiles": {str(p): _percentile(ranked, p) for p in PERCENTILES},
            "jsd": mean_interval(self.jsd).as_dict(),
            "mean_change": _or_none(statistics.fmean(self.changes) if self.changes else math.nan),
            "median_change": _or_none(statistics.median(self.changes) if self.changes else math.nan),
            "change_percentiles": {str(p): _percentile(sorted(self.changes), p) for p in PERCENTILES},
            "completions": len(self.perplexity),
            "tokens": len(self.changes),
            "empty": self.empty,
        }


@dataclass(frozen=True)
class DriftScores:
    """A tuned model against its base.

    Attributes:
        of_tuned, of_base: completions of each, read by the other.
        gold_perplexity: of given completions under (base, tuned), per token; None where none were given.
    """

    of_tuned: OwnCompletions
    of_base: OwnCompletions
    gold_perplexity: tuple[float, float] | None = None

    @cached_property
    def forward_perplexity(self) -> Interval:
        """Mean perplexity of the tuned model's completions under the base, with its 95% interval."""
        return mean_interval(self.of_tuned.perplexity)

    @cached_property
    def reverse_perplexity(self) -> Interval:
        """Mean perplexity of the base's completions under the tuned model."""
        return mean_interval(self.of_base.perplexity)

    @cached_property
    def jsd(self) -> Interval:
        """Mean JSD over the completions of both."""
        return mean_interval([*self.of_tuned.jsd, *self.of_base.jsd])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        gold = None if self.gold_perplexity is None else dict(zip(("base", "tuned"), self.gold_perplexity, strict=True))
        return {
            "of_tuned": self.of_tuned.as_dict(),
            "of_base": self.of_base.as_dict(),
            "jsd": self.jsd.as_dict(),
            "gold_perplexity": gold,
        }

    def table(self) -> str:
        """For a terminal."""
        rows = [
            ("forward perplexity", self.forward_perplexity, "base on the tuned model's completions"),
            ("reverse perplexity", self.reverse_perplexity, "tuned model on the base's completions"),
            ("JSD, nats a token", self.jsd, "on both"),
        ]
        lines = [f"{name:<20} {i.value:8.4f}  [{i.low:.4f}, {i.high:.4f}]  {what}" for name, i, what in rows]
        for name, own in (("its own", self.of_tuned), ("the base's", self.of_base)):
            if own.changes:
                mean, median = statistics.fmean(own.changes), statistics.median(own.changes)
                lines.append(f"{'change of log p':<20} {mean:+8.4f}  median {median:+.4f}  on {name} completions")
        if self.gold_perplexity is not None:
            base, tuned = self.gold_perplexity
            lines.append(f"{'gold perplexity':<20} {base:8.4f} -> {tuned:.4f}")
        return "\n".join(lines)


@dataclass(frozen=True)
class DriftWithTask:
    """Drift on general chat, and on the prompts of a task beside it.

    Attributes:
        chat: on the package's probe.
        task: what was asked.
        on_task: on that, with the perplexity of the gold completions.
    """

    chat: DriftScores
    task: TaskPrompts
    on_task: DriftScores

    def as_dict(self) -> dict[str, Any]:
        """For JSON: as `DriftScores.as_dict` on chat, and the task's under "task"."""
        asked = {"dataset": self.task.source, "split": self.task.split, "prompts": len(self.task.prompts)}
        return {**self.chat.as_dict(), "task": {**asked, **self.on_task.as_dict()}}

    def table(self) -> str:
        """For a terminal."""
        heading = f"on {len(self.task.prompts)} prompts of {self.task.source}"
        return f"on general chat\n{self.chat.table()}\n{heading}\n{self.on_task.table()}"


def evaluate_drift(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt] | None = None,
    *,
    base_model: Any = None,
    golds: Sequence[str] | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    impl: str | None = None,
) -> DriftScores:
    """Drift on the two models' own completions.

    Args:
        model: the tuned one; left in the mode it was in.
        tokenizer: of both.
        prompts: of a task; None for general chat (the package's probe).
        base_model: before training. With a PEFT model it may be left out: the base is the same module without adapter.
        golds: right completions, one a prompt, whose perplexity is told too.
        max_new_tokens: longest completion.
        batch_size: prompts together.
        impl: of `unisd_kernels`.

    Raises:
        ValueError: no prompts, no base to compare with, or not as many golds as prompts.
    """
    if prompts is None:
        prompts = [item["prompt"] for item in CHAT_PROBE]
    if not prompts:
        raise ValueError("there are no prompts to compare on")
    prompts = [readable(tokenizer, prompt) for prompt in prompts]
    base, as_base = base_of(model, base_model)

    sizes: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    of_tuned = greedy_replies(model, tokenizer, prompts, **sizes)
    with as_base():
        of_base = greedy_replies(base, tokenizer, prompts, **sizes)
    gold = None
    if golds is not None:
        scoring: dict[str, Any] = {"batch_size": batch_size, "impl": impl}
        tuned = completion_scores(model, tokenizer, prompts, golds, **scoring).perplexity
        with as_base():
            gold = completion_scores(base, tokenizer, prompts, golds, **scoring).perplexity, tuned

    def read(replies: Sequence[str], by_base: bool) -> OwnCompletions:
        kept = [place for place, reply in enumerate(replies) if tokenizer(reply, add_special_tokens=False)["input_ids"]]
        pairs = encode_pairs(
            tokenizer, [prompts[place] for place in kept], [replies[place] for place in kept], include_eos=False
        )
        perplexity, jsd, changes = [math.nan] * len(pairs), [math.nan] * len(pairs), []
        with scoring_mode(model), scoring_mode(base):
            for batch in scoring_batches(pairs, batch_size, model_device(model)):
                head, hidden = model_head(model), hidden_rows(model, batch)
                with as_base():
                    base_head, base_hidden = model_head(base), hidden_rows(base, batch)
                now = linear_logprobs(hidden, head, batch.target_ids, impl=impl).logprobs.double()
                before = linear_logprobs(base_hidden, base_head, batch.target_ids, impl=impl).logprobs.double()
                divergence = linear_divergence(hidden, head, base_hidden, base_head, beta=0.5, impl=impl).double()
                changes += (now - before).tolist()
                parts = zip(
                    (before if by_base else now).split(batch.lengths), divergence.split(batch.lengths), strict=True
                )
                for index, (logprobs, tokens) in zip(batch.indices, parts, strict=True):
                    perplexity[index] = math.exp(-logprobs.mean().item())
                    jsd[index] = tokens.mean().item()
        return OwnCompletions(tuple(perplexity), tuple(jsd), tuple(changes), len(replies) - len(kept))

    return DriftScores(read(of_tuned, by_base=True), read(of_base, by_base=False), gold)


def _percentile(ranked: Sequence[float], percent: int) -> float | None:
    return ranked[round((len(ranked) - 1) * percent / 100)] if ranked else None


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
