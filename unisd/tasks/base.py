"""The interface of a kind of task: from a row to its texts, and from a model's reply to a demonstration or a refusal.

A task has no model and no randomness: whoever asks a model (`unisd.prepare`) gets the texts to ask with from here, and
the judgement of the reply.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from unisd.turns import Prompt


class Rejected(ValueError):
    """A row, or a model's reply, that cannot be used.

    The message is a reason that many rows may share ("the answer is not one of the choices"): it is counted, and never
    holds the content of the row or of the reply.
    """


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
    """

    name: ClassVar[str]
    negative_tokens: ClassVar[int] = 1024

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

    @abstractmethod
    def induction_request(self, examples: Sequence[Example]) -> str:
        """Text that asks a model for one general instruction from solved examples."""

    @abstractmethod
    def read_instruction(self, examples: Sequence[Example], reply: str) -> str:
        """The instruction that a reply holds.

        Raises:
            Rejected: one that holds content of an example or an answer, or is none.
        """
