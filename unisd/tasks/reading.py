"""From raw rows to examples of one task, with a count of what was dropped and why."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from unisd.tasks.base import Example, Rejected, Task
from unisd.tasks.code import Code
from unisd.tasks.columns import Columns, kind_of
from unisd.tasks.multiple_choice import MultipleChoice
from unisd.tasks.open_answer import OpenAnswer
from unisd.tasks.tools import Tools, instructions_of

KINDS = ("open", "choice", "code", "tools")
"""Kinds of task by name."""


@dataclass
class Reading:
    """Examples of one task.

    Attributes:
        task: of all of them.
        examples, numbers: those that can be used, and their numbers among the raw rows (ToolAlpaca: instructions).
        rejected: reasons with counts.
    """

    task: Task
    examples: list[Example] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)


def make_task(kind: str, *, unsafe_code: bool = False) -> Task:
    """The task of that name.

    Args:
        unsafe_code: run code without bubblewrap, see `unisd.sandbox.Sandbox`.

    Raises:
        ValueError: no such kind.
    """
    if kind == "code":
        return Code(unsafe_code)
    tasks: dict[str, type[Task]] = {"open": OpenAnswer, "choice": MultipleChoice, "tools": Tools}
    if kind not in tasks:
        raise ValueError(f"the task must be one of {', '.join(KINDS)}, got {kind!r}")
    return tasks[kind]()


def read_rows(
    rows: Iterable[Mapping[str, Any]],
    columns: Columns | None = None,
    *,
    kind: str | None = None,
    seed: int = 42,
    shuffle_choices: bool = True,
    unsafe_code: bool = False,
) -> Reading:
    """Examples of raw rows.

    Args:
        rows: at least one.
        columns: names given by the user; the others are found.
        kind: of task; None to be told from the first row.
        seed: the order of choices is drawn by `Random(seed + number of the row)`.
        shuffle_choices: whether it is drawn at all.

    Raises:
        ValueError: no rows, or no column for question or answer.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("there are no rows")
    columns = columns or Columns()
    task = make_task(kind or kind_of(columns, rows[0]), unsafe_code=unsafe_code)
    if isinstance(task, Tools):
        rows = [one for row in rows for one in (instructions_of(row) if "Instructions" in row else (row,))]
    else:
        columns = columns.resolve(dict.fromkeys(name for row in rows for name in row))
    reading = Reading(task)
    for number, row in enumerate(rows):
        try:
            example = task.read(row, columns, random.Random(seed + number) if shuffle_choices else None)
        except Rejected as reason:
            reading.rejected[str(reason)] += 1
            continue
        reading.examples.append(example)
        reading.numbers.append(number)
    return reading
