"""The behaviour probe of a model, by kind of item (see `unisd.data.behaviour_probe`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unisd.data.behaviour_probe import behaviour_probe
from unisd.generation import greedy_replies
from unisd.scoring import Interval, wilson
from unisd.scoring.behaviour import FORMS, KINDS, is_as_it_should
from unisd.turns import as_prompt, readable

LIMITS = "small, and read by rules: it can show that a habit changed, not that a model is safe, honest or right"


@dataclass(frozen=True)
class BehaviourScores:
    """Replies to the items, and whether they are as they should be; all in the same order."""

    items: tuple[Mapping[str, Any], ...]
    replies: tuple[str, ...]
    good: tuple[bool, ...]

    @property
    def by_kind(self) -> dict[str, Interval]:
        """Kind -> share of its items whose reply is as it should be, with Wilson's interval."""
        shares = {}
        for kind in KINDS:
            found = [good for item, good in zip(self.items, self.good, strict=True) if item["kind"] == kind]
            if found:
                shares[kind] = wilson(sum(found), len(found))
        return shares

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the replies."""
        return {"by_kind": {kind: share.as_dict() for kind, share in self.by_kind.items()}, "limits": LIMITS}

    def completions(self) -> Iterator[dict[str, Any]]:
        """A row for each item."""
        for number, (item, reply, good) in enumerate(zip(self.items, self.replies, self.good, strict=True)):
            yield {**item, "number": number, "reply": reply, "as_it_should": good}

    def table(self) -> str:
        """For a terminal."""
        lines = [f"{KINDS[kind]:<36} {share.percent()}  of {share.count}" for kind, share in self.by_kind.items()]
        return "\n".join([*lines, f"({LIMITS})"])


def evaluate_behaviour(
    model: Any,
    tokenizer: Any,
    items: Sequence[Mapping[str, Any]] | None = None,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
) -> BehaviourScores:
    """Greedy replies to the probe, scored.

    Args:
        model, tokenizer: what is evaluated.
        items: None for the package's own.
        max_new_tokens: longest reply.
        batch_size: prompts together.

    Raises:
        ValueError: no items, or one that is not as `load_items` wants it.
    """
    chosen = behaviour_probe() if items is None else list(items)
    if not chosen:
        raise ValueError("there are no items to probe with")
    for number, item in enumerate(chosen, 1):
        _check(item, f"item {number}")
    prompts = [readable(tokenizer, as_prompt(item["prompt"], True)) for item in chosen]
    replies = greedy_replies(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    good = tuple(is_as_it_should(item, reply) for item, reply in zip(chosen, replies, strict=True))
    return BehaviourScores(tuple(chosen), tuple(replies), good)


def load_items(file: Path) -> list[dict[str, Any]]:
    """Items of a file of JSON lines: `kind` and `prompt`; for "fact" also `any_of`, a list of words; for "format" also
    `form`, e.g. {"most_words": 5}.

    Raises:
        ValueError: no such file, a line that is no item.
    """
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file")
    items = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                item = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: not JSON ({error})") from None
            _check(item, f"{file}, line {number}")
            items.append(item)
    return items


def _check(item: Any, where: str) -> None:
    if not isinstance(item, Mapping) or not {"kind", "prompt"} <= item.keys():
        raise ValueError(f"{where}: an item needs kind and prompt")
    if item["kind"] not in KINDS:
        raise ValueError(f"{where}: kind must be one of {', '.join(KINDS)}, got {item['kind']!r}")
    needed = {"fact": "any_of", "format": "form"}.get(item["kind"])
    if needed is not None and not item.get(needed):
        raise ValueError(f"{where}: an item of kind {item['kind']!r} needs {needed}")
    for form in item.get("form", {}):
        if form not in FORMS:
            raise ValueError(f"{where}: a form is one of {', '.join(FORMS)}, got {form!r}")
