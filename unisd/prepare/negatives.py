"""Wrong demonstrations: of the model itself, or another row's answer."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from unisd.generation import Sampling
from unisd.prepare.asking import ask
from unisd.prepare.replies import ReplyStore
from unisd.tasks import Example, Task
from unisd.tasks.multiple_choice import LETTERS
from unisd.tasks.text import plain
from unisd.turns import Prompt

TEMPERATURE = 0.7


@dataclass
class Negatives:
    """Wrong demonstrations of some examples.

    Attributes:
        chosen: one of each example, None where there is none.
        valid: how many there are of each.
        asked, replies: requests, and replies that were read for them (further tries included).
        rejected: reasons with counts.
    """

    chosen: list[str | None]
    valid: list[int]
    asked: int = 0
    replies: int = 0
    rejected: Counter[str] = field(default_factory=Counter)


def model_negatives(
    task: Task,
    examples: Sequence[Example],
    store: ReplyStore,
    *,
    seed: int,
    retries: int,
    as_prompt: Callable[[str], Prompt],
    progress: bool = True,
) -> Negatives:
    """Negatives that the model writes, several of a row, each validated; one of the valid ones is drawn.

    Args:
        as_prompt: from a text to what the model reads.
    """
    asked_for = [(example, place) for example in examples for place in range(task.negatives_per_row)]
    asked = ask(
        store,
        [as_prompt(task.negative_request(example, place)) for example, place in asked_for],
        lambda pairs: task.read_negatives([(*asked_for[number], reply) for number, reply in pairs], progress=progress),
        sampling=lambda number: Sampling(TEMPERATURE, task.reply_tokens(asked_for[number][0])),
        seed=seed,
        retries=retries,
        name="negatives",
        progress=progress,
    )
    rng = random.Random(seed)
    chosen, valid = [], []
    for start in range(0, len(asked_for), task.negatives_per_row):
        # The same text twice is one negative.
        held = list(dict.fromkeys(t for t in asked.accepted[start : start + task.negatives_per_row] if t is not None))
        draw = rng.random()  # drawn for every row, so that one row's negatives do not decide another's
        chosen.append(held[int(draw * len(held))] if held else None)
        valid.append(len(held))
    return Negatives(chosen, valid, len(asked_for), asked.replies, asked.rejected)


def other_negatives(examples: Sequence[Example], groups: Sequence[int], *, seed: int) -> Negatives:
    """Another row's demonstration, whose answer must differ from the row's own; None where no other does."""
    rng = random.Random(seed)
    chosen: list[str | None] = []
    for row, example in enumerate(examples):
        start = rng.randrange(len(examples))
        others = (examples[(start + step) % len(examples)] for step in range(len(examples)))
        other_groups = (groups[(start + step) % len(examples)] for step in range(len(examples)))
        found = next(
            (
                other.demonstration
                for other, group in zip(others, other_groups, strict=True)
                if group != groups[row] and _is_wrong(example, other)
            ),
            None,
        )
        chosen.append(found)
    return Negatives(chosen, [int(one is not None) for one in chosen], len(examples))


def _is_wrong(example: Example, other: Example) -> bool:
    if example.choices and LETTERS.index(other.answer) >= len(example.choices):
        return False  # a letter that the row does not have
    return plain(other.answer) != plain(example.answer)
