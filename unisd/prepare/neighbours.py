"""Which other rows each row is shown, and in which of its K contexts."""

from __future__ import annotations

import random
from collections.abc import Sequence

Contexts = list[list[list[int]]]
"""[rows][K][demonstrations]: numbers of rows."""


def random_contexts(groups: Sequence[int], num_contexts: int, per_context: int, seed: int) -> Contexts:
    """Other rows with different questions, drawn without replacement; with it only where there are too few.

    Args:
        groups: see `question_groups`: rows of a row's own group are never drawn.
        num_contexts, per_context: K contexts of as many demonstrations.
        seed: of `random.Random`.

    Raises:
        ValueError: all rows are one group.
    """
    rng, needed, count = random.Random(seed), num_contexts * per_context, len(groups)
    others = len(set(groups)) - 1
    if others == 0:
        asked = f"all {count} rows ask the same question" if count > 1 else "there is one row alone"
        raise ValueError(f"{asked}: there is no other solved example to show; give more rows, or --contexts induction")
    contexts = []
    for group in groups:
        chosen: list[int] = []
        shown = {group}
        while len(chosen) < needed:
            # By rejection while few are taken, so that 100,000 rows cost no pool of their own each.
            drawn = rng.randrange(count)
            if groups[drawn] not in shown or (groups[drawn] != group and len(chosen) >= others):
                chosen.append(drawn)
                shown.add(groups[drawn])
        contexts.append(_sliced(chosen, per_context))
    return contexts


def retrieved_contexts(nearest: Sequence[Sequence[int]], num_contexts: int, per_context: int) -> Contexts:
    """The nearest rows in order: context k takes the k-th slice.

    Args:
        nearest: of each row, at least one other, the nearest first; they are repeated in turn if too few.
    """
    needed = num_contexts * per_context
    return [_sliced([row[place % len(row)] for place in range(needed)], per_context) for row in nearest]


def fixed_sets(groups: Sequence[int], num_sets: int, per_set: int, seed: int) -> list[list[int]]:
    """M disjoint sets of rows with different questions, drawn at random.

    Raises:
        ValueError: fewer different questions than the sets need.
    """
    order = list(range(len(groups)))
    random.Random(f"{seed} sets").shuffle(order)
    taken: set[int] = set()
    distinct = [row for row in order if groups[row] not in taken and not taken.add(groups[row])]  # type: ignore[func-returns-value]
    if len(distinct) < num_sets * per_set:
        raise ValueError(
            f"context_pool={num_sets} sets of {per_set} need {num_sets * per_set} different questions, got "
            f"{len(distinct)}; lower one of the two"
        )
    return [distinct[place * per_set : (place + 1) * per_set] for place in range(num_sets)]


def drawn_sets(groups: Sequence[int], sets: Sequence[Sequence[int]], num_contexts: int, seed: int) -> list[list[int]]:
    """For each row K distinct numbers of sets that do not hold its question.

    Raises:
        ValueError: a row has fewer than K such sets.
    """
    rng = random.Random(f"{seed} draws")
    held = [{groups[row] for row in one} for one in sets]
    drawn = []
    for row, group in enumerate(groups):
        allowed = [number for number, questions in enumerate(held) if group not in questions]
        if len(allowed) < num_contexts:
            raise ValueError(
                f"context_pool={len(sets)} leaves row {row} only {len(allowed)} sets without its own question, but it "
                f"needs {num_contexts}; raise it to at least {num_contexts + 1}"
            )
        drawn.append(rng.sample(allowed, num_contexts))
    return drawn


def _sliced(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]
