"""The texts of every view around any task (what each model reads: see docs/data.md).

All are strings. Beside a prompt of messages a view takes the place of the last user message (`unisd.contexts.frame`).
"""

from __future__ import annotations

from collections.abc import Sequence

from unisd.contexts.template import TeacherTemplate
from unisd.tasks.base import Example, Task

_HEADER = (
    "Below are solved examples of other tasks of the same kind. They show what a good answer looks like; do not solve "
    "them again and do not copy from them."
)
_RULE = "That was the last example. Work out the next task by itself."
_ONLY = "Now answer only this task:"
_INDUCED = "General advice for tasks of this kind:"


def student_text(example: Example) -> str:
    """The student's prompt, or the text of its last message."""
    return example.prompt if isinstance(example.prompt, str) else str(example.prompt[-1]["content"])


def teacher_view(task: Task, example: Example, template: TeacherTemplate | None = None) -> str:
    """The student's prompt with the gold demonstration."""
    return _with(task, example, example.demonstration, template)


def negative_view(task: Task, example: Example, wrong: str, template: TeacherTemplate | None = None) -> str:
    """The same with a wrong demonstration."""
    return _with(task, example, wrong, template)


def auxiliary_prefix(task: Task, examples: Sequence[Example]) -> str:
    """Everything before the student's prompt, a function of the solved examples alone: rows that are shown the same
    ones share it, and a cache of its keys and values serves them all."""
    numbered = [f"Example {number}\n{task.solved(example)}" for number, example in enumerate(examples, 1)]
    return "\n\n".join([_HEADER, *numbered, _RULE, _ONLY, ""])


def auxiliary_view(task: Task, example: Example, examples: Sequence[Example]) -> str:
    """The student's prompt behind solved examples of other questions."""
    return auxiliary_prefix(task, examples) + student_text(example)


def induction_view(task: Task, example: Example, instruction: str, template: TeacherTemplate | None = None) -> str:
    """The student's prompt behind an induced instruction, and the study sentence."""
    study = task.study if template is None or template.study is None else template.study
    return f"{_INDUCED}\n{instruction}\n\n{student_text(example)}\n\n{study}"


def _with(task: Task, example: Example, demonstration: str, template: TeacherTemplate | None) -> str:
    return (template or TeacherTemplate()).fill(student_text(example), demonstration, task.study)
