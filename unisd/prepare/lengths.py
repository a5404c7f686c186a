"""Lengths of rows: examples too long for any view are dropped before others are shown them, then rows by every view."""

from __future__ import annotations

from typing import Any

from unisd.contexts import ContextSpec, LengthLimit, PromptFrame
from unisd.contexts.template import TeacherTemplate
from unisd.prepare.report import PrepareReport
from unisd.prepare.settings import PrepareSettings
from unisd.rows.check import RowChecker
from unisd.tasks import Reading
from unisd.tasks.views import teacher_view
from unisd.turns import encode_prompt

Rows = list[dict[str, Any]]
_VIEW = "teacher prompt"


def fitting_examples(
    reading: Reading, template: TeacherTemplate, tokenizer: Any, limit: LengthLimit, report: PrepareReport
) -> list[bool]:
    """Whether question and gold answer of each example, by themselves, leave room for a view.

    One that does not would be dropped in the end, but not before a model has read it to write a wrong answer, and
    other rows have been shown it, which are then too long as well.
    """
    kept = []
    too_long: dict[str, list[int]] = {}
    for example in reading.examples:
        text = teacher_view(reading.task, example, template)
        # No token is shorter than a byte, and few texts are so long that they have to be tokenized for this.
        length = len(text.encode())
        excess = limit.excess(_VIEW, length)
        if excess is not None:
            length = len(tokenizer(text, verbose=False)["input_ids"])  # without its own warning of the length
            excess = limit.excess(_VIEW, length)
        if excess is not None:
            too_long.setdefault(excess, []).append(length)
        kept.append(excess is None)
    _count(too_long, report)
    return kept


def fitting_rows(
    rows: Rows,
    settings: PrepareSettings,
    tokenizer: Any,
    limit: LengthLimit,
    report: PrepareReport,
    progress: bool,
) -> Rows:
    """The rows whose every view is short enough."""
    spec = ContextSpec(settings.num_auxiliary, settings.negatives != "none", "prepare")
    checker = RowChecker(
        spec,
        PromptFrame.of("auto", tokenizer),
        lambda prompts: [encode_prompt(tokenizer, prompt) for prompt in prompts],
    )
    measured = checker.measure_all(rows, "lengths", progress)
    kept = []
    too_long: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        if place in measured.faults:
            report.dropped[measured.faults[place]] += 1
            continue
        lengths = dict(zip(checker.views, map(int, measured.lengths[place]), strict=True))
        excess = next((text for view, size in lengths.items() if (text := limit.excess(view, size))), None)
        if excess is not None:
            too_long.setdefault(excess, []).append(max(lengths.values()))
            continue
        kept.append(row)
        for view, size in lengths.items():
            name = view.partition(" prompt")[0] if view != "prompt" else "student"
            report.longest[name] = max(report.longest.get(name, 0), size)
    _count(too_long, report)
    return kept


def _count(too_long: dict[str, list[int]], report: PrepareReport) -> None:
    for excess, sizes in too_long.items():
        report.dropped[f"a view is too long ({excess}; the longest has {max(sizes)} tokens)"] += len(sizes)
