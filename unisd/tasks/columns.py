"""Which column of somebody's rows is the question, which the answer, and what kind of task they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

_KNOWN: dict[str, tuple[str, ...]] = {
    "prompt": ("question", "Question", "prompt", "instruction", "problem", "query", "input", "text"),
    "answer": (
        "answer",
        "Correct Answer",
        "response",
        "completion",
        "output",
        "reply",
        "solution",
        "code",
        "canonical_solution",
        "target",
    ),
    "choices": ("choices", "options"),
    "tests": ("test_list", "tests", "test"),
    "explanation": (
        "explanation",
        "Explanation",
        "abstractive_explanation",
        "rationale",
        "reasoning",
        "solution",
    ),
}

CONVERSATIONS = ("messages", "conversation", "conversations")
"""Columns that hold a question and its answer as one conversation."""
WRONG_ANSWERS = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
"""Columns of GPQA's wrong choices."""


@dataclass(frozen=True)
class Columns:
    """Names of columns; None for one to be found by its name.

    Attributes:
        prompt: the question: a text, or messages that end with the user's.
        answer: the gold answer.
        choices, tests, explanation: where there are any.
    """

    prompt: str | None = None
    answer: str | None = None
    choices: str | None = None
    tests: str | None = None
    explanation: str | None = None

    @classmethod
    def of(cls, options: Any) -> Columns:
        """The names given by options `prompt_column`, `answer_column`, ..."""
        return cls(**{entry.name: getattr(options, f"{entry.name}_column") for entry in fields(cls)})

    def resolve(self, names: Iterable[str]) -> Columns:
        """The same with every column that there is.

        Args:
            names: of the columns that are there.

        Raises:
            ValueError: a column that was named and is not there, or no question or answer among them.
        """
        present = list(names)
        found: dict[str, str | None] = {}
        for entry in fields(self):
            role, given = entry.name, getattr(self, entry.name)
            if given is not None and given not in present:
                raise ValueError(f"there is no column {given!r} ({role}): the rows have {_listed(present)}")
            taken = {name for name in found.values() if name is not None}
            known = [usual for usual in _KNOWN[role] if usual in present and usual not in taken]
            # Then "Answer", or the " answer" of a first line with blanks behind its commas.
            known += [name for usual in _KNOWN[role] for name in present if _plain(name) == usual and name not in taken]
            found[role] = given if given is not None else next(iter(known), None)
        conversation = any(name in present for name in CONVERSATIONS)
        for role in ("prompt", "answer"):
            if found[role] is None and not conversation:
                raise ValueError(
                    f"which column is the {'question' if role == 'prompt' else 'answer'}? The rows have "
                    f"{_listed(present)}: name it as --{role}_column"
                )
        return Columns(**found)


def kind_of(columns: Columns, row: Mapping[str, Any]) -> str:
    """Kind of task of a row: "tools", "code", "choice" or "open"."""
    if {"Instructions", "Golden_Answers"} <= row.keys() or {"instruction", "golden_answers"} <= row.keys():
        return "tools"
    if columns.tests is not None or "test_list" in row or {"test", "entry_point"} <= row.keys():
        return "code"
    if columns.choices is not None or "choices" in row or WRONG_ANSWERS[0] in row:
        return "choice"
    return "open"


def _plain(name: str) -> str:
    return name.strip().casefold()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "no columns"
