"""Asking a model until its reply is accepted, a bounded number of times."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from unisd.generation import Request, Sampling
from unisd.prepare.replies import ReplyStore
from unisd.tasks.base import Rejected
from unisd.turns import Prompt

T = TypeVar("T")


@dataclass
class Asked(Generic[T]):
    """What came of some questions.

    Attributes:
        accepted: by question, None where no reply was.
        replies: that were read in all.
        rejected: reasons of the replies that were not accepted, with counts.
    """

    accepted: list[T | None]
    replies: int = 0
    rejected: Counter[str] = field(default_factory=Counter)


def ask(
    store: ReplyStore,
    prompts: Sequence[Prompt],
    read: Callable[[Sequence[tuple[int, str]]], Sequence[T | Rejected]],
    *,
    sampling: Callable[[int], Sampling],
    seed: int,
    retries: int,
    name: str,
    progress: bool = True,
) -> Asked[T]:
    """Ask each question until a reply is accepted, `retries` times more at most.

    Args:
        prompts: the questions.
        read: from pairs (number of the question, reply) to what each reply holds, or why it was rejected.
        sampling: by number of the question; questions of one setting are asked together.
        seed: with a question's number and the try it gives the seed of a reply.
        name: for the bar.
    """
    result: Asked[T] = Asked([None] * len(prompts))
    pending = list(range(len(prompts)))
    for attempt in range(retries + 1):
        if not pending:
            break
        pairs: list[tuple[int, str]] = []
        by_setting: dict[Sampling, list[int]] = {}
        for number in pending:
            by_setting.setdefault(sampling(number), []).append(number)
        for setting, numbers in by_setting.items():
            requests = [Request(prompts[number], _seed(seed, name, number, attempt)) for number in numbers]
            label = f"{name}, try {attempt + 1}" if progress else None
            pairs += zip(numbers, store.replies(requests, setting, label), strict=True)
        pairs.sort()
        for (number, _), held in zip(pairs, read(pairs), strict=True):
            result.replies += 1
            if isinstance(held, Rejected):
                result.rejected[str(held)] += 1
            else:
                result.accepted[number] = held
        pending = [number for number in pending if result.accepted[number] is None]
    return result


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")
