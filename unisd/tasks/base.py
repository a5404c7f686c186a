"""The interface of a kind of task: from a row to its texts, and from a model's reply to a demonstration or a refusal.

A task has no model and no randomness: whoever asks a model (`unisd.prepare`) gets the texts to ask with from here, and
the judgement of the reply.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar

from unisd.contexts.template import STUDY
from unisd.tasks import instructions
from unisd.tasks.columns import Columns
from unisd.tasks.rejected import Rejected
from unisd.turns import Prompt

__all__ = ["Example", "Rejected", "Task"]


@dataclass(frozen=True)
class Example:
    """A question with its gold answer.

    Attributes:
        question: its bare text, by which neighbours are searched and duplicates are recognized.
        prompt: what the student reads: a text, or messages that end with the user's.
        answer: the gold answer: the reply, the letter of a choice, code without a fence, a ReAct trace.
        demonstration: the gold answer as the teacher is shown it.
        choices: options of multiple choice, in the order shown.
        tests: statements that the code must satisfy.
        explanation: of the answer; "" for none.
        details: what else the task needs of the row (signature, set-up code, gold calls, ...).
    """

    question: str
    prompt: Prompt
    answer: str
    demonstration: str
    choices: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    explanation: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


class Task(ABC):
    """A kind of task.

    Attributes:
        name: "open", "choice", "code" or "tools".
        negative_tokens: most tokens of a reply to a negative's request.
        negatives_per_row: different requests for a negative of one row.
        study: sentence that asks the teacher to study its demonstration.
    """

    name: ClassVar[str]
    negative_tokens: ClassVar[int] = 1024
    negatives_per_row: ClassVar[int] = 4
    study: ClassVar[str] = STUDY

    @abstractmethod
    def read(self, row: Mapping[str, Any], columns: Columns, rng: Random | None = None) -> Example:
        """The example of a row.

        Args:
            columns: as `Columns.resolve` gives them.
            rng: draws what has no order of its own (that of choices); None keeps the row's order.

        Raises:
            Rejected: a row that cannot be used.
        """

    def search_text(self, example: Example) -> str:
        """What neighbours are searched by."""
        return example.question

    def reply_tokens(self, example: Example) -> int:
        """Most tokens of a reply to one of its negative requests."""
        return self.negative_tokens

    def faults(self, examples: Sequence[Example], *, progress: bool = False) -> list[Rejected | None]:
        """What is wrong with examples that only a closer look tells, and None for those that are right."""
        return [None] * len(examples)

    @abstractmethod
    def solved(self, example: Example) -> str:
        """The example with its answer, as one of the numbered ones of an auxiliary context."""

    @abstractmethod
    def negative_request(self, example: Example, place: int) -> str:
        """Text that asks a model for the row's negative number `place` (0, 1, ...)."""

    @abstractmethod
    def read_negative(self, example: Example, place: int, reply: str) -> str:
        """The wrong demonstration that a reply holds, in the form of `Example.demonstration`.

        Raises:
            Rejected: a reply without one, or one that is not wrong.
        """

    def read_negatives(
        self, asked: Sequence[tuple[Example, int, str]], *, progress: bool = False
    ) -> list[str | Rejected]:
        """`read_negative` of many replies: the demonstrations, and in their places the reasons where there is none."""
        held: list[str | Rejected] = []
        for example, place, reply in asked:
            try:
                held.append(self.read_negative(example, place, reply))
            except Rejected as reason:
                held.append(reason)
        return held

    def induction_request(self, examples: Sequence[Example]) -> str:
        """Text that asks a model for one general instruction from solved examples."""
        return instructions.request([self.solved(example) for example in examples])

    def content(self, example: Example) -> str:
        """What an instruction must not repeat of an example, besides its demonstration."""
        return example.question

    def read_instruction(self, examples: Sequence[Example], reply: str) -> str:
        """The instruction that a reply holds.

        Raises:
            Rejected: one that holds content of an example or an answer, or is none.
        """
        return instructions.read(reply, [(self.content(example), example.demonstration) for example in examples])
