"""The procedural diagnostic of arXiv 2605.00817: carry out n arithmetic steps and give the last value.

S1 and S2 are given; each of S3 ... S(n+2) is an operation (+ - * /) on two earlier values: the one before, and one that
lies exactly `look_back` values further back. Only the last value is asked for, and it is neither of the two.
Every value is rounded to 3 decimals as it is computed, so that the right reply is the same for everybody. The paper's
prompts and the grid of its 55 sets are not public: the prompt, the ranges of the values in between and the rounding are
ours.

Beside it, `unisd.data.procedural` has small integers and a format that a 135M model can learn. As there, everything is
a function of (seed, index) and the settings, splits are disjoint by the task's own text, and only
`random.Random(str).random()` is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from functools import cached_property
from typing import TYPE_CHECKING, Any

from unisd.data.procedural import MAX_STEPS, SPLITS, split_of, trainer_row
from unisd.data.sequence import choose, generator

if TYPE_CHECKING:
    from datasets import Dataset

OPERATIONS = ("+", "-", "*", "/")
RANGES = {"unit": (0, 1), "small": (1, 10), "large": (10, 100)}
"""Ranges of the two inputs by name."""
MOST_LOOK_BACK = 7
DECIMALS = Decimal("0.001")
# Values in between stay here where the operations allow a choice: not all digits before the point, and not all lost.
_COMFORTABLE = (Decimal("0.01"), Decimal(1000))
_REPRESENTABLE = Decimal("1e12")
_MAX_DRAWS = 500


@dataclass(frozen=True)
class DiagnosticStep:
    """`S<target> = S<left> <op> S<right>`; numbers count from 1."""

    target: int
    left: int
    op: str
    right: int

    def evaluate(self, values: Sequence[Decimal]) -> Decimal:
        """Rounded result, given the values S1, S2, ...

        Raises:
            ZeroDivisionError: a division by 0.
        """
        return applied(values[self.left - 1], self.op, values[self.right - 1])

    def __str__(self) -> str:
        return f"S{self.target} = S{self.left} {self.op} S{self.right}"


@dataclass(frozen=True)
class DiagnosticTask:
    """Two inputs and the steps to carry out."""

    inputs: tuple[Decimal, Decimal]
    steps: tuple[DiagnosticStep, ...]

    @cached_property
    def values(self) -> tuple[Decimal, ...]:
        """S1, S2, ..., each rounded to 3 decimals."""
        values = list(self.inputs)
        for step in self.steps:
            values.append(step.evaluate(values))
        return tuple(values)

    @property
    def answer(self) -> Decimal:
        """The last value."""
        return self.values[-1]

    @property
    def task_id(self) -> str:
        """64 hex digits that identify the task."""
        return hashlib.sha256(self._body.encode()).hexdigest()

    @property
    def split(self) -> str:
        """The split this task belongs to, by its text: about 70% "train", 10% "validation", 20% "test"."""
        return split_of(self.task_id)

    @property
    def question(self) -> str:
        """The task in words."""
        last = f"S{len(self.values)}"
        return (
            f"{self._body}\nCarry out these steps in order, one line each, and round every value to 3 decimals. "
            f'Then write "Answer: <value of {last}>".'
        )

    @property
    def gold_trace(self) -> str:
        """The correct reply: a line `S3 = 0.25 + 0.5 = 0.75` for each step, then `Answer: 0.75`."""
        return self._trace(self.values)

    @property
    def wrong_trace(self) -> str:
        """A plausible wrong reply: the middle step is off by 1 and a tenth of its value, and later steps use it."""
        values = list(self.inputs)
        middle = (len(self.steps) + 1) // 2
        for number, step in enumerate(self.steps, 1):
            try:
                value = step.evaluate(values)
            except ZeroDivisionError:
                value = Decimal(1)
            values.append(value + abs(value) / 10 // DECIMALS * DECIMALS + 1 if number == middle else value)
        if abs(values[-1] - self.answer) <= 2 * DECIMALS:
            values[-1] += 1  # the mistake was lost on the way
        return self._trace(values)

    @property
    def _body(self) -> str:
        first = f"S1 = {shown(self.inputs[0])}\nS2 = {shown(self.inputs[1])}"
        return "\n".join([first, *map(str, self.steps)])

    def _trace(self, values: Sequence[Decimal]) -> str:
        lines = [
            f"S{step.target} = {shown(values[step.left - 1])} {step.op} {shown(values[step.right - 1])} = "
            f"{shown(values[step.target - 1])}"
            for step in self.steps
        ]
        return "\n".join([*lines, f"Answer: {shown(values[-1])}"])


@dataclass(frozen=True)
class DiagnosticSettings:
    """What tasks are drawn.

    Attributes:
        seed: another seed gives other tasks.
        split: "train", "validation" or "test"; no task is in two splits.
        num_steps: 1 to 95 each; the tasks take them in turn.
        look_back: 1 to 7: of a step's operands one is the value before, the other lies so many values further back
            (where there are not so many, it is S1).
        values: of the inputs: "unit" (0..1), "small" (1..10) or "large" (10..100), with 2 decimals.
        operations: to draw from; one alone is a set of its own.

    Raises:
        ValueError: a setting out of range.
    """

    seed: int | str = 0
    split: str = "test"
    num_steps: tuple[int, ...] = (5, 10)
    look_back: int = 1
    values: str = "small"
    operations: tuple[str, ...] = OPERATIONS

    def __post_init__(self) -> None:
        if not self.num_steps or not all(1 <= each <= MAX_STEPS for each in self.num_steps):
            raise ValueError(f"num_steps must be in 1..{MAX_STEPS}, got {list(self.num_steps)}")
        if not 1 <= self.look_back <= MOST_LOOK_BACK:
            raise ValueError(f"look_back must be in 1..{MOST_LOOK_BACK}, got {self.look_back}")
        if self.values not in RANGES:
            raise ValueError(f"values must be one of {', '.join(RANGES)}, got {self.values!r}")
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        if not self.operations or not set(self.operations) <= set(OPERATIONS):
            given = " ".join(self.operations) or "none"
            raise ValueError(f"operations must be some of {' '.join(OPERATIONS)}, got {given}")


def diagnostic_tasks(count: int, settings: DiagnosticSettings | None = None) -> list[DiagnosticTask]:
    """Tasks without repetition; the first ones do not depend on `count`.

    Raises:
        ValueError: a negative count, or values that leave 12 digits (one operation alone over many steps).
    """
    settings = settings or DiagnosticSettings()
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    used: set[str] = set()
    tasks = []
    for index in range(count):
        steps = settings.num_steps[index % len(settings.num_steps)]
        tasks.append(_first_new(("task", index), steps, settings, used))
        used.add(tasks[-1].task_id)
    return tasks


def diagnostic_rows(
    count: int, settings: DiagnosticSettings | None = None, *, num_auxiliary: int = 3
) -> list[dict[str, Any]]:
    """Rows for the trainer, with the columns of `procedural_rows`; `answer` is a str.

    Args:
        count: number of rows.
        settings: by default those of the split "train".
        num_auxiliary: K, the number of auxiliary contexts a row, each with another task of as many steps.

    Raises:
        ValueError: as `diagnostic_tasks`.
    """
    settings = settings or DiagnosticSettings(split="train")
    rows = []
    for index, task in enumerate(diagnostic_tasks(count, settings)):
        others: list[DiagnosticTask] = []
        for k in range(num_auxiliary):
            used = {task.task_id, *(other.task_id for other in others)}
            others.append(_first_new(("auxiliary", index, k), len(task.steps), settings, used))
        rows.append(trainer_row(task, others, task.wrong_trace, shown(task.answer)))
    return rows


def diagnostic_dataset(count: int, settings: DiagnosticSettings | None = None, *, num_auxiliary: int = 3) -> Dataset:
    """`diagnostic_rows` as a `datasets.Dataset`; same arguments and errors."""
    from datasets import Dataset

    return Dataset.from_list(diagnostic_rows(count, settings, num_auxiliary=num_auxiliary))


def applied(left: Decimal, op: str, right: Decimal) -> Decimal:
    """`left op right`, rounded half up to 3 decimals.

    Raises:
        ZeroDivisionError: a division by 0.
        ValueError: another operation.
    """
    if op not in OPERATIONS:
        raise ValueError(f"operation must be one of {' '.join(OPERATIONS)}, got {op!r}")
    if op == "/" and right == 0:
        raise ZeroDivisionError("division by 0")
    exact = {"+": left.__add__, "-": left.__sub__, "*": left.__mul__, "/": left.__truediv__}[op](right)
    return exact.quantize(DECIMALS, ROUND_HALF_UP)


def shown(value: Decimal) -> str:
    """A value as it is written: without zeros at its end."""
    text = f"{value:.3f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _first_new(
    name: tuple[object, ...], num_steps: int, settings: DiagnosticSettings, used: set[str]
) -> DiagnosticTask:
    """The first task that is not used, of those drawn one after another from the generator called `name`."""
    rng = generator("diagnostic", *name, num_steps, *vars(settings).values())
    low, high = RANGES[settings.values]
    grid = [Decimal(n) / 100 for n in range(100 * low, 100 * high + 1) if n]
    for _ in range(_MAX_DRAWS):
        inputs = (choose(rng, grid), choose(rng, grid))
        task = _random_task(rng, inputs, num_steps, settings.look_back, settings.operations)
        # An answer that is an input (S1 + S2 - S2) would be right without a step.
        if task is None or task.answer in task.inputs:
            continue
        if task.split == settings.split and task.task_id not in used:
            return task
    raise ValueError(
        f"no further task of {num_steps} steps of {' '.join(settings.operations)} on {settings.values} values after "
        f"{_MAX_DRAWS} draws: values leave 12 digits, or all tasks are used; ask for fewer steps, more operations or "
        "fewer tasks"
    )


def _random_task(
    rng: Any, inputs: tuple[Decimal, Decimal], num_steps: int, look_back: int, operations: Sequence[str]
) -> DiagnosticTask | None:
    """A task, or None where a value cannot be written."""
    values = list(inputs)
    steps = []
    for _ in range(num_steps):
        target = len(values) + 1
        last, far = target - 1, max(1, target - 1 - look_back)
        kinds = []
        for op in operations:
            orders = [(last, far)] if op in "+*" else [(last, far), (far, last)]
            kinds.append([DiagnosticStep(target, left, op, right) for left, right in orders])
        possible = [[step for step in kind if _size(step, values) is not None] for kind in kinds]
        comfortable = [[step for step in kind if _is_comfortable(_size(step, values))] for kind in possible]
        usable = [kind for kind in comfortable if kind] or [kind for kind in possible if kind]
        if not usable:
            return None
        step = choose(rng, choose(rng, usable))
        steps.append(step)
        values.append(step.evaluate(values))
    return DiagnosticTask(inputs, tuple(steps))


def _size(step: DiagnosticStep, values: Sequence[Decimal]) -> Decimal | None:
    """Absolute value of a step's result, or None where it cannot be written in 12 digits."""
    try:
        size = abs(step.evaluate(values))
    except (ZeroDivisionError, InvalidOperation):
        return None
    return size if size <= _REPRESENTABLE else None


def _is_comfortable(size: Decimal | None) -> bool:
    return size is not None and _COMFORTABLE[0] <= size <= _COMFORTABLE[1]
