"""The views of a prepared row, with what differs from the student's prompt told apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ShownView:
    """One view.

    Attributes:
        name: "student", "teacher", "auxiliary 1", ..., "negative".
        what: who reads it and why, in a few words.
        parts: pairs (text, whether the student does not read it), which joined are the view.
        tokens: its length, None where it is not known.
    """

    name: str
    what: str
    parts: tuple[tuple[str, bool], ...]
    tokens: int | None = None

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.parts)


_WHAT = {
    "student": "the model that learns, and writes the completion",
    "teacher": "scores it with the gold demonstration in sight",
    "auxiliary": "after other solved examples: where these disagree, a token counts less; or a part of the teacher",
    "negative": "scores it after a wrong demonstration, from which student or teacher is pushed away",
}


def views_to_show(row: Mapping[str, Any], count: Callable[[str], int] | None = None) -> list[ShownView]:
    """The views of a row, the student's first.

    Args:
        count: tokens of a view as a prompt.
    """
    student = _text(row["prompt"])
    named = {"student": student, "teacher": _text(row["teacher_prompt"])}
    for number, prompt in enumerate(row.get("auxiliary_prompts") or (), 1):
        named[f"auxiliary {number}"] = _text(prompt)
    if row.get("negative_prompt"):
        named["negative"] = _text(row["negative_prompt"])
    return [
        ShownView(name, _WHAT[name.split()[0]], _parts(text, student), None if count is None else count(text))
        for name, text in named.items()
    ]


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _parts(text: str, student: str) -> tuple[tuple[str, bool], ...]:
    before, found, after = text.partition(student)
    if not found:
        return ((text, True),)
    parts = ((before, True), (student, False), (after, True))
    return tuple((part, differs) for part, differs in parts if part)
