"""What a reply to a procedural task did: which steps it carried out, how, and what it answered first.

Of `unisd.data.diagnostic`. A step is a line "S5 = ... = 3.2"; its value is the last number of the line. An answer is
"Answer: 3.2". The *first* answer counts: what a reply says after it, it says with hindsight.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from unisd.data.diagnostic import DiagnosticTask

TOLERANCE = Decimal("0.001")
"""Of a value: a half may be rounded to either side."""
_STEP = re.compile(r"(?<!\w)S(\d+)\s*(?:=|:)([^\n]*)")
_NUMBER = re.compile(r"(?<![\w.])[-+\u2212]?\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")
_ANSWER = re.compile(r"(?i:answer)[\s*_`]*:[\s*_`$]*(?:S\d+\s*=\s*)?([-+\u2212]?\d+(?:,\d{3})*(?:\.\d+)?)")

KINDS = ("exact", "right", "wrong", "missing", "premature", "under_executed", "over_executed", "self_corrected")
"""What a reply is, in short; see `Execution.kind`."""


@dataclass(frozen=True)
class Execution:
    """A reply against its task.

    Attributes:
        answer: the first one; None where there is none.
        is_right: whether it is the task's, within `TOLERANCE`.
        executed: of the task's n steps, how many are written.
        exact: how many of them have the right value the first time.
        first_wrong: number 1..n of the first step that is wrong or not written; None where all are right.
        missing: no answer.
        premature: the answer comes before steps that are then still carried out.
        under_executed, over_executed: fewer steps than asked for; steps that nobody asked for.
        self_corrected: a step, or the answer, is written again with another value.
    """

    answer: Decimal | None
    is_right: bool
    executed: int
    exact: int
    first_wrong: int | None
    missing: bool
    premature: bool
    under_executed: bool
    over_executed: bool
    self_corrected: bool

    @property
    def kind(self) -> str:
        """One word for the reply: the first of missing, premature, self_corrected, over_executed, under_executed that
        holds; else "exact" (all steps and the answer right), "right" (the answer, but not all steps) or "wrong"."""
        for name in ("missing", "premature", "self_corrected", "over_executed", "under_executed"):
            if getattr(self, name):
                return name
        if not self.is_right:
            return "wrong"
        return "exact" if self.first_wrong is None else "right"


def execution(task: DiagnosticTask, reply: str) -> Execution:
    """What the reply did."""
    num_steps, last = len(task.steps), len(task.values)
    values: dict[int, list[Decimal]] = {}
    places: dict[int, int] = {}
    for match in _STEP.finditer(reply):
        numbers = _NUMBER.findall(match[2])
        if numbers and not _is_the_task(task, int(match[1]), match[2]):
            values.setdefault(int(match[1]), []).append(_decimal(numbers[-1]))
            places.setdefault(int(match[1]), match.start())
    answers = [(match.start(), _decimal(match[1])) for match in _ANSWER.finditer(reply)]
    asked = range(3, last + 1)
    right = [bool(values.get(k)) and _equal(values[k][0], task.values[k - 1]) for k in asked]
    answer = answers[0][1] if answers else None
    again = [
        *(each for k, each in values.items() if k in asked),
        [value for _, value in answers],
    ]
    return Execution(
        answer=answer,
        is_right=answer is not None and _equal(answer, task.answer),
        executed=sum(k in values for k in asked),
        exact=sum(right),
        first_wrong=None if all(right) else right.index(False) + 1,
        missing=answer is None,
        premature=bool(answers) and any(places[k] > answers[0][0] for k in asked if k in places),
        under_executed=sum(k in values for k in asked) < num_steps,
        over_executed=any(k > last for k in values),
        self_corrected=any(not _equal(value, each[0]) for each in again for value in each[1:]),
    )


def _is_the_task(task: DiagnosticTask, number: int, text: str) -> bool:
    """Whether a line only repeats the task: an input, or a step without a value ("S3 = S1 + S2")."""
    if number <= 2:
        return True
    return number <= len(task.values) and f"S{number} ={text}".strip() == str(task.steps[number - 3])


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("\u2212", "-"))


def _equal(one: Decimal, other: Decimal) -> bool:
    return abs(one - other) <= TOLERANCE
