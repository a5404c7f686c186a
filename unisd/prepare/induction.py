"""General instructions that the model induces from solved examples, of which each row is given K."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

from unisd.generation import Sampling
from unisd.prepare.asking import ask
from unisd.prepare.replies import ReplyStore
from unisd.tasks import Example, Rejected, Task
from unisd.turns import Prompt

MOST_INSTRUCTIONS = 100
_SAMPLING = Sampling(temperature=0.7, max_new_tokens=256)


def induce(
    task: Task,
    examples: Sequence[Example],
    store: ReplyStore,
    *,
    num_demos: int,
    seed: int,
    retries: int,
    wanted: int,
    as_prompt: Callable[[str], Prompt],
    progress: bool = True,
) -> tuple[list[str], Counter[str]]:
    """Different valid instructions from disjoint random groups of `num_demos` examples, and what was rejected.

    Args:
        wanted: least number of instructions.
        as_prompt: from a text to what the model reads.

    Raises:
        ValueError: fewer than `wanted` were valid.
    """
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    count = min(len(examples) // num_demos, MOST_INSTRUCTIONS)
    groups = [[examples[row] for row in order[place * num_demos : (place + 1) * num_demos]] for place in range(count)]

    def read(pairs: Sequence[tuple[int, str]]) -> list[str | Rejected]:
        held: list[str | Rejected] = []
        for number, reply in pairs:
            try:
                held.append(task.read_instruction(groups[number], reply))
            except Rejected as reason:
                held.append(reason)
        return held

    asked = ask(
        store,
        [as_prompt(task.induction_request(group)) for group in groups],
        read,
        sampling=lambda number: _SAMPLING,
        seed=seed,
        retries=retries,
        name="instructions",
        progress=progress,
    )
    instructions = list(dict.fromkeys(text for text in asked.accepted if text is not None))
    if len(instructions) < wanted:
        reasons = "; ".join(f"{number} x {reason}" for reason, number in asked.rejected.most_common(3))
        raise ValueError(
            f"induction gave {len(instructions)} valid instructions from {count} groups of {num_demos} examples, but "
            f"every row needs {wanted} ({reasons or 'too few rows'}); give more rows, --retries, or --contexts random"
        )
    return instructions, asked.rejected


def drawn_instructions(instructions: Sequence[str], count: int, rows: int, seed: int) -> list[list[str]]:
    """For each row `count` different instructions: the same one twice would have no spread."""
    rng = random.Random(f"{seed} instructions")
    return [rng.sample(list(instructions), count) for _ in range(rows)]
