"""Procedural execution: follow a short arithmetic procedure exactly, step by step.

A task gives two integers `a` and `b` and n steps, each defining a new variable from earlier ones; the model has to
write one line a step and then the final value. The idea (and the range of 1 to 95 steps with look-back) is from
arXiv 2605.00817. It suits self-distillation: a model of 135M parameters cannot do it when only asked, but continues
correctly once a demonstration is in its context, and that difference is what the student learns.

Values stay in `1..max_value` because the generator only draws operations whose result is there; no modulo is needed,
so every line is ordinary arithmetic.

Everything is a function of (seed, index) and the arguments: the same in every process and Python version. Only
`random.Random(str).random()` is used, the one sequence that Python promises to keep.

Splits are disjoint by construction: a task's own text decides, through SHA-256, which split it belongs to, whatever
the seed, and the generator draws until it finds one of the wanted split.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from unisd.data.sequence import choose, generator, shuffle

if TYPE_CHECKING:
    from datasets import Dataset

Message = dict[str, str]

MAX_STEPS = 95
# Tenths of the task space; which tenth a task falls into is decided by its text alone.
_SPLIT_TENTHS = {"train": range(7), "validation": range(7, 8), "test": range(8, 10)}
SPLITS = tuple(_SPLIT_TENTHS)
_MAX_DRAWS = 2000
_SMALL_CONSTANTS = range(1, 10)
_FACTORS = range(2, 6)
_ANSWER = re.compile(r"Answer\s*:\s*(-?\d+)")


@dataclass(frozen=True)
class Step:
    """`<target> = <left> <op> <right>`: `left` is a variable, `right` a variable or a constant, `op` one of `+ - *`."""

    target: str
    left: str
    op: str
    right: str

    def evaluate(self, values: dict[str, int]) -> int:
        """Result of the step, given the values of the variables it reads."""
        return _apply(values[self.left], self.op, _operand(self.right, values))

    def __str__(self) -> str:
        return f"{self.target} = {self.left} {self.op} {self.right}"


@dataclass(frozen=True)
class ProceduralTask:
    """Two inputs and the steps to carry out."""

    a: int
    b: int
    steps: tuple[Step, ...]

    @cached_property
    def values(self) -> dict[str, int]:
        """Value of every variable, the inputs included."""
        return self._run()

    @property
    def answer(self) -> int:
        """Value of the last variable."""
        return self.values[self.steps[-1].target]

    @property
    def task_id(self) -> str:
        """64 hex digits that identify the task: SHA-256 of its inputs and steps."""
        return hashlib.sha256(self._body.encode()).hexdigest()

    @property
    def split(self) -> str:
        """The split this task belongs to: about 70% of all tasks are "train", 10% "validation", 20% "test"."""
        return split_of(self.task_id)

    @property
    def question(self) -> str:
        """The task in words, with the wanted format of the reply."""
        last = self.steps[-1].target
        what = "Compute x1 in one line" if len(self.steps) == 1 else f"Compute x1 to {last} in order, one line per step"
        return f'{self._body}\n{what}, then write "Answer: <value of {last}>".'

    @property
    def gold_trace(self) -> str:
        """The correct reply: a line `x1 = 10 - 8 = 2` for each step, then `Answer: 2`."""
        return self._trace(self.values)

    def wrong_trace(self, seed: int | str) -> str:
        """A plausible wrong reply: one step's result is off, later steps use it, and the final answer differs."""
        rng = _named("wrong", seed, self.task_id)
        mistakes = [(step.target, wrong) for step in self.steps for wrong in self._mistakes(step)]
        shuffle(rng, mistakes)
        for mistake in mistakes:
            values = self._run(mistake)
            # A negative value would give the mistake away.
            if values[self.steps[-1].target] != self.answer and min(values.values()) >= 0:
                return self._trace(values)
        return self._trace(self._run((self.steps[-1].target, self.answer + 1)))

    @property
    def _body(self) -> str:
        return "\n".join([f"a = {self.a}, b = {self.b}", *map(str, self.steps)])

    def _run(self, mistake: tuple[str, int] | None = None) -> dict[str, int]:
        values = {"a": self.a, "b": self.b}
        for step in self.steps:
            is_wrong = mistake is not None and mistake[0] == step.target
            values[step.target] = mistake[1] if mistake is not None and is_wrong else step.evaluate(values)
        return values

    def _trace(self, values: dict[str, int]) -> str:
        lines = [
            f"{step.target} = {values[step.left]} {step.op} {_operand(step.right, values)} = {values[step.target]}"
            for step in self.steps
        ]
        return "\n".join([*lines, f"Answer: {values[self.steps[-1].target]}"])

    def _mistakes(self, step: Step) -> list[int]:
        """Results that someone careless could get: off by a little or by ten, or the wrong operation."""
        right = self.values[step.target]
        left, other = self.values[step.left], _operand(step.right, self.values)
        near = [right + error for error in (-10, -2, -1, 1, 2, 10)]
        swapped = [_apply(left, op, other) for op in "+-" if op != step.op]
        return sorted({value for value in near + swapped if value >= 0} - {right})


def split_of(task_id: str) -> str:
    """The split of a task by the hex digits that identify it."""
    tenth = int(task_id[:8], 16) % 10
    return next(name for name, tenths in _SPLIT_TENTHS.items() if tenth in tenths)


def generate_task(
    seed: int | str,
    index: int,
    *,
    num_steps: int = 2,
    look_back: int = 1,
    max_value: int = 20,
    split: str = "train",
) -> ProceduralTask:
    """The task number `index` of a seed, the same wherever it is called.

    Two indices may give equal tasks where the space is small (few steps and a small `max_value`);
    `procedural_rows` skips repetitions.

    Args:
        seed, index: name the task.
        num_steps: 1 to 95.
        look_back: how many steps back an operand may lie, at least 1. With 1 a step reads the variable of the step
            before it, and perhaps an input or a constant; with L one of the last L variables, and perhaps another.
        max_value: all values are in `1..max_value`; at least 10.
        split: "train", "validation" or "test".

    Raises:
        ValueError: an argument out of range.
    """
    _check_settings(num_steps, look_back, max_value, split)
    return next(_draw(("task", seed, index), num_steps, look_back, max_value, split))


def procedural_rows(
    count: int,
    *,
    seed: int | str = 0,
    split: str = "train",
    num_steps: int | Sequence[int] = (1, 2, 3),
    look_back: int = 1,
    max_value: int = 20,
    num_auxiliary: int = 3,
    exclude: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Rows for the trainer and for `unisd.evaluation`, without repeated tasks.

    The first rows do not depend on `count`.

    Args:
        count: number of rows.
        seed: another seed gives other tasks (mostly: see `exclude`).
        split: "train", "validation" or "test"; no task is in two splits.
        num_steps: one number, or several that the rows take in turn.
        look_back, max_value: see `generate_task`.
        num_auxiliary: K, the number of auxiliary contexts a row, each with a demonstration of another task of the
            same split and difficulty.
        exclude: `task_id`s that must not appear, e.g. those of the rows of another seed in the same split. (They may
            still serve as auxiliary demonstrations.)

    Returns:
        Dictionaries with

        - `prompt`: list of messages, the question alone;
        - `teacher_prompt`: list of messages, the question with its own correct reply (privileged);
        - `auxiliary_prompts`: K lists of messages, the question after another task with its correct reply;
        - `negative_prompt`: list of messages, as `teacher_prompt`, with a wrong reply;
        - `completion` and `demonstration`: str, the correct reply;
        - `answer`: int; `num_steps`: int; `task_id`: str.

    Raises:
        ValueError: an argument out of range, or more rows than there are different tasks of this kind.
    """
    if count < 0 or num_auxiliary < 0:
        raise ValueError(f"count and num_auxiliary must not be negative, got {count} and {num_auxiliary}.")
    steps_in_turn = [num_steps] if isinstance(num_steps, int) else list(num_steps)
    if not steps_in_turn:
        raise ValueError("num_steps is empty; give a number of steps, or several.")
    for steps in steps_in_turn:
        _check_settings(steps, look_back, max_value, split)
    used = set(exclude)
    rows = []
    for index in range(count):
        steps = steps_in_turn[index % len(steps_in_turn)]
        task = _first_new(_draw(("task", seed, index), steps, look_back, max_value, split), used)
        used.add(task.task_id)
        shown = {task.task_id}
        others = []
        for k in range(num_auxiliary):
            other = _first_new(_draw(("auxiliary", seed, index, k), steps, look_back, max_value, split), shown)
            shown.add(other.task_id)
            others.append(other)
        rows.append(trainer_row(task, others, task.wrong_trace(seed), task.answer))
    return rows


def procedural_dataset(count: int, **settings: Any) -> Dataset:
    """`procedural_rows` as a `datasets.Dataset`; same arguments and errors."""
    from datasets import Dataset

    return Dataset.from_list(procedural_rows(count, **settings))


def parse_answer(text: str) -> int | None:
    """The number after the last `Answer:` in a reply, or None where there is none."""
    found = _ANSWER.findall(text)
    return int(found[-1]) if found else None


# The wordings were chosen by measurement on SmolLM2-135M-Instruct, among a dozen. Only asked, the model writes traces
# of the right kind, nearly all wrong. With the demonstration in front of the question it mostly repeats the reply,
# format included (least so with one step); with it behind the question, the model more often leaves out the last line
# or repeats the words around the demonstration.


def demonstration_prompt(question: str, reply: str) -> list[Message]:
    """The question with a reply to it (right or wrong) as a demonstration: the teacher's and the negative context."""
    return [_user(f"Solution:\n{reply}\n\n{question}")]


def example_prompt(question: str, example_question: str, example_reply: str) -> list[Message]:
    """The question after another question with its reply: an auxiliary context."""
    return [_user(f"Example:\n{example_question}\n\n{example_reply}\n\nNow solve this one:\n{question}")]


def trainer_row(task: Any, others: Sequence[Any], wrong_trace: str, answer: int | str) -> dict[str, Any]:
    """A row for the trainer, see `procedural_rows`.

    Args:
        task: has `question`, `gold_trace`, `steps` and `task_id`.
        others: tasks for the auxiliary contexts.
        wrong_trace: for the negative context.
        answer: of the task.
    """
    return {
        "prompt": [_user(task.question)],
        "teacher_prompt": demonstration_prompt(task.question, task.gold_trace),
        "auxiliary_prompts": [example_prompt(task.question, other.question, other.gold_trace) for other in others],
        "negative_prompt": demonstration_prompt(task.question, wrong_trace),
        "completion": task.gold_trace,
        "demonstration": task.gold_trace,
        "answer": answer,
        "num_steps": len(task.steps),
        "task_id": task.task_id,
    }


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _check_settings(num_steps: int, look_back: int, max_value: int, split: str) -> None:
    if not 1 <= num_steps <= MAX_STEPS:
        raise ValueError(f"num_steps must be in 1..{MAX_STEPS}, got {num_steps}.")
    if look_back < 1:
        raise ValueError(f"look_back must be at least 1 (the step before), got {look_back}.")
    if max_value < 10:
        raise ValueError(f"max_value must be at least 10, or there are too few tasks; got {max_value}.")
    if split not in _SPLIT_TENTHS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")


def _draw(
    name: tuple[object, ...], num_steps: int, look_back: int, max_value: int, split: str
) -> Iterator[ProceduralTask]:
    """Tasks of the split, drawn one after another from the generator called `name`."""
    rng = _named(*name, num_steps, look_back, max_value, split)
    for _ in range(_MAX_DRAWS):
        task = _random_task(rng, num_steps, look_back, max_value)
        if task.split == split:
            yield task
    raise ValueError(
        f"no further task of {num_steps} step(s) with max_value={max_value} for the split {split!r} after "
        f"{_MAX_DRAWS} draws: nearly all are used. Ask for fewer rows, more steps or a larger max_value."
    )


def _first_new(tasks: Iterator[ProceduralTask], used: set[str]) -> ProceduralTask:
    return next(task for task in tasks if task.task_id not in used)


def _random_task(rng: random.Random, num_steps: int, look_back: int, max_value: int) -> ProceduralTask:
    inputs = list(range(1, max_value + 1))
    a = choose(rng, inputs)
    b = choose(rng, [value for value in inputs if value != a])
    values = {"a": a, "b": b}
    steps = []
    for number in range(1, num_steps + 1):
        recent = [f"x{earlier}" for earlier in range(max(1, number - look_back), number)] or ["a", "b"]
        step = _random_step(rng, f"x{number}", recent, values, max_value)
        values[step.target] = step.evaluate(values)
        steps.append(step)
    return ProceduralTask(a, b, tuple(steps))


def _random_step(
    rng: random.Random, target: str, recent: Sequence[str], values: dict[str, int], max_value: int
) -> Step:
    """A step that reads one of `recent`, with a result in `1..max_value`."""
    operand = choose(rng, recent)
    variables = [name for name in dict.fromkeys(["a", "b", *recent]) if name != operand]
    # Kinds are drawn before operands, so that the many possible constants do not crowd the variables out.
    kinds = [
        [Step(target, operand, "+", other) for other in variables],
        [Step(target, operand, "-", other) for other in variables]
        + [Step(target, other, "-", operand) for other in variables],
        [Step(target, operand, op, str(constant)) for op in "+-" for constant in _SMALL_CONSTANTS],
        [Step(target, operand, "*", str(factor)) for factor in _FACTORS],
    ]
    possible = [[step for step in kind if 1 <= step.evaluate(values) <= max_value] for kind in kinds]
    # Never empty: every value in 1..max_value has a neighbour there, reached by adding or subtracting 1.
    return choose(rng, choose(rng, [kind for kind in possible if kind]))


def _named(*name: object) -> random.Random:
    return generator("procedural", *name)


def _apply(left: int, op: str, right: int) -> int:
    if op == "+":
        return left + right
    if op == "-":
        return left - right
    if op == "*":
        return left * right
    raise ValueError(f"operation must be one of + - *, got {op!r}.")


def _operand(name: str, values: dict[str, int]) -> int:
    return values[name] if name in values else int(name)
