"""The text that a teacher reads: the question, a demonstration, and the request to study it."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

STUDY = "Study it, then solve the task in your own way and in your own words."
TOOLS_STUDY = "Study its thoughts and its calls, then solve the task in your own way: think first, then act."

TEACHER_TEMPLATE = (
    "{prompt}\n\nHere is an example of a good response to exactly this task:\n\n{demonstration}\n\n{study}"
)
"""Teacher's text made of the student's prompt, a demonstration and a study sentence."""

_NAMES = {"prompt", "demonstration", "study"}
_ALIASES = {"privileged_context": "demonstration"}


@dataclass(frozen=True)
class TeacherTemplate:
    """A template and its study sentence.

    Attributes:
        template: text with {prompt} and {demonstration} (or {privileged_context}), and {study} where the sentence goes.
        study: the sentence; None for the task's own.

    Raises:
        ValueError: a template without one of the two, or with another placeholder.
    """

    template: str = TEACHER_TEMPLATE
    study: str | None = None

    def __post_init__(self) -> None:
        try:
            named = [name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None]
        except ValueError as error:
            raise ValueError(f"teacher_template is no template ({error}); write {{{{ for a brace itself") from None
        unknown = [name for name in named if _ALIASES.get(name, name) not in _NAMES]
        if unknown:
            raise ValueError(
                f"teacher_template has the placeholder {{{unknown[0]}}}; it may hold {{prompt}}, {{demonstration}} and "
                "{study}"
            )
        for needed in ("prompt", "demonstration"):
            if needed not in {_ALIASES.get(name, name) for name in named}:
                raise ValueError(f"teacher_template lacks the placeholder {{{needed}}}")
        if self.study is not None and "study" not in named:
            raise ValueError("study_sentence has no effect: teacher_template lacks the placeholder {study}")

    @classmethod
    def of(cls, options: Any) -> TeacherTemplate:
        """The template of options with `teacher_template` and `study_sentence`, None for the usual one."""
        return cls(options.teacher_template or TEACHER_TEMPLATE, options.study_sentence)

    def fill(self, prompt: str, demonstration: str, study: str = STUDY) -> str:
        """The text for a prompt and a demonstration.

        Args:
            study: the task's own sentence, where the template was given none.
        """
        text = self.template.format(
            prompt=prompt,
            demonstration=demonstration,
            privileged_context=demonstration,
            study=study if self.study is None else self.study,
        )
        return text.rstrip()
