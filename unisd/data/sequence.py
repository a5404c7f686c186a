"""Random sequences that are the same in every process and Python version: of `random.Random(str).random()` only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

_T = TypeVar("_T")


def generator(*name: object) -> random.Random:
    """A generator by name."""
    return random.Random("unisd." + "|".join(map(str, name)))


def choose(rng: random.Random, items: Sequence[_T]) -> _T:
    """One of the items, each as likely."""
    return items[int(rng.random() * len(items))]


def shuffle(rng: random.Random, items: list[Any]) -> None:
    """Put the items into a random order, in place."""
    for last in range(len(items) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        items[last], items[other] = items[other], items[last]
