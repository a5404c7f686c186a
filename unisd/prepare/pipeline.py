"""From raw rows to prepared ones, in order: read, contexts, negatives, views, lengths."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from unisd.contexts import LengthLimit
from unisd.generation import Generator
from unisd.peak_memory import peak_memory_gib
from unisd.prepare.induction import drawn_instructions, induce
from unisd.prepare.lengths import Rows, fitting_examples, fitting_rows
from unisd.prepare.negatives import Negatives, model_negatives, other_negatives
from unisd.prepare.neighbours import drawn_sets, fixed_sets, random_contexts, retrieved_contexts
from unisd.prepare.questions import question_groups
from unisd.prepare.replies import ReplyStore
from unisd.prepare.report import PrepareReport
from unisd.prepare.settings import PrepareSettings
from unisd.tasks import Example, Reading, Task, read_rows
from unisd.tasks.views import auxiliary_view, induction_view, negative_view, teacher_view
from unisd.turns import Prompt, as_prompt


@dataclass(frozen=True)
class Prepared:
    """Rows with every view, and what became of the raw ones."""

    rows: Rows
    report: PrepareReport


def prepare(
    raw: Sequence[dict[str, Any]],
    settings: PrepareSettings,
    *,
    generator: Callable[[], Generator] | None = None,
    chats: bool = True,
    tokenizer: Any = None,
    limit: LengthLimit | None = None,
    every_view: bool = True,
    progress: bool = True,
) -> Prepared:
    """Prepared rows of raw ones.

    Args:
        raw: see `unisd.prepare.sources`.
        settings: what is made.
        generator: makes the model that writes, when it is first needed.
        chats: whether that model is asked in messages (it has a chat template) or in plain text.
        tokenizer: to measure lengths; None leaves all of them to the trainer.
        limit: rows with a longer view are dropped, before anything is made of them where question and gold answer alone
            are longer.
        every_view: measure all views in the end; False leaves that to the trainer.

    Raises:
        ValueError: rows that nothing can be made of, or settings that these rows cannot serve.
    """
    report = PrepareReport()
    with _timed(report, "reading"):
        reading = read_rows(
            raw,
            settings.columns,
            kind=settings.kind,
            seed=settings.seed,
            shuffle_choices=settings.shuffle_choices,
            unsafe_code=settings.unsafe_code,
        )
        report.kind, report.read = reading.task.name, len(reading.examples) + reading.rejected.total()
        report.dropped.update(reading.rejected)
        if settings.negatives == "model":
            faults = reading.task.faults(reading.examples, progress=progress)
            report.dropped.update(str(fault) for fault in faults if fault is not None)
            _keep(reading, [fault is None for fault in faults])
        limit = limit or LengthLimit(None, None)
        if tokenizer is not None:
            _keep(reading, fitting_examples(reading, settings.template, tokenizer, limit, report))
    if not reading.examples:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in report.dropped.most_common(5))
        raise ValueError(f"none of the {report.read} rows can be used: {reasons}")
    store = _Lazy(generator, chats)
    groups = question_groups([example.question for example in reading.examples])
    report.duplicates = len(groups) - len(set(groups))
    views: list[dict[str, Any]] = [{} for _ in reading.examples]
    if settings.num_auxiliary:
        with _timed(report, "contexts"):
            _add_contexts(views, reading, groups, settings, store, report, progress)
    if settings.negatives != "none":
        with _timed(report, "negatives"):
            negatives = _negatives(reading, groups, settings, store, progress)
            _report_negatives(report, negatives, settings)
        for view, example, wrong in zip(views, reading.examples, negatives.chosen, strict=True):
            if wrong is not None:
                view["negative_prompt"] = negative_view(reading.task, example, wrong, settings.template)
        kept = [wrong is not None for wrong in negatives.chosen]
        if not all(kept):
            report.dropped["no valid negative"] += len(kept) - sum(kept)
            _keep(reading, kept)
            views = [view for view, keep in zip(views, kept, strict=True) if keep]
    rows = [
        _row(number, reading.task, example, view, settings)
        for number, example, view in zip(reading.numbers, reading.examples, views, strict=True)
    ]
    if tokenizer is not None and every_view:
        with _timed(report, "lengths"):
            rows = fitting_rows(rows, settings, tokenizer, limit, report, progress)
    if not rows:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in report.dropped.most_common(5))
        raise ValueError(f"no row is left of {report.read}: {reasons}")
    report.kept = len(rows)
    peak = peak_memory_gib(torch.device("cpu"))
    report.peak_memory_gib = None if math.isnan(peak) else round(peak, 2)
    return Prepared(rows, report)


class _Lazy:
    """The model that writes and its stored replies, made at the first use."""

    def __init__(self, make: Callable[[], Generator] | None, chats: bool) -> None:
        self._make, self._chats = make, chats
        self._store: ReplyStore | None = None

    def __call__(self) -> ReplyStore:
        if self._store is None:
            if self._make is None:
                raise ValueError("a model has to write something here, but none was given")
            self._store = ReplyStore(self._make())
        return self._store

    def as_prompt(self, text: str) -> Prompt:
        return as_prompt(text, self._chats)


def _add_contexts(
    views: list[dict[str, Any]],
    reading: Reading,
    groups: Sequence[int],
    settings: PrepareSettings,
    store: _Lazy,
    report: PrepareReport,
    progress: bool,
) -> None:
    """Put `auxiliary_prompts`, and `auxiliary_pool` where there is one, into the views."""
    task, examples = reading.task, reading.examples
    count, demos = settings.num_auxiliary, settings.demos_per_context
    shown = f"{demos} solved example{'s'[: demos > 1]} of other questions in each"
    if settings.contexts == "induction":
        instructions, rejected = induce(
            task,
            examples,
            store(),
            num_demos=settings.num_demos,
            seed=settings.seed,
            retries=settings.retries,
            wanted=count,
            as_prompt=store.as_prompt,
            progress=progress,
        )
        report.rejected.update(rejected)
        report.contexts = f"{count} of {len(instructions)} induced instructions for each row"
        drawn = drawn_instructions(instructions, count, len(examples), settings.seed)
        for view, example, texts in zip(views, examples, drawn, strict=True):
            view["auxiliary_prompts"] = [induction_view(task, example, text, settings.template) for text in texts]
        return
    if settings.context_pool:
        sets = fixed_sets(groups, settings.context_pool, demos, settings.seed)
        numbers = drawn_sets(groups, sets, count, settings.seed)
        report.contexts = f"{count} of {len(sets)} fixed sets for each row, {shown}"
        for view, row_numbers in zip(views, numbers, strict=True):
            view["auxiliary_pool"] = row_numbers
        contexts = [[sets[number] for number in row_numbers] for row_numbers in numbers]
    elif settings.contexts == "retrieval":
        from unisd.prepare.embeddings import embed, nearest_rows

        vectors = embed([task.search_text(example) for example in examples], settings.encoder, progress=progress)
        found = nearest_rows(vectors, groups, count * demos, progress=progress)
        nearest = [[int(row) for row in line if row >= 0] for line in found]
        if not all(nearest):
            raise ValueError(f"all {len(groups)} rows ask the same question: there is no other example to show")
        contexts = retrieved_contexts(nearest, count, demos)
        report.contexts = f"{count} for each row by retrieval ({settings.encoder}), {shown}"
    else:
        contexts = random_contexts(groups, count, demos, settings.seed)
        report.contexts = f"{count} random ones for each row, {shown}"
    for view, example, chosen in zip(views, examples, contexts, strict=True):
        view["auxiliary_prompts"] = [auxiliary_view(task, example, [examples[row] for row in one]) for one in chosen]


def _negatives(
    reading: Reading, groups: Sequence[int], settings: PrepareSettings, store: _Lazy, progress: bool
) -> Negatives:
    if settings.negatives == "other":
        return other_negatives(reading.examples, groups, seed=settings.seed)
    return model_negatives(
        reading.task,
        reading.examples,
        store(),
        seed=settings.seed,
        retries=settings.retries,
        as_prompt=store.as_prompt,
        progress=progress,
    )


def _report_negatives(report: PrepareReport, negatives: Negatives, settings: PrepareSettings) -> None:
    report.negatives = "by the model itself" if settings.negatives == "model" else "another row's answer"
    report.asked, report.replies, report.valid = negatives.asked, negatives.replies, sum(negatives.valid)
    report.rejected.update(negatives.rejected)


def _row(number: int, task: Task, example: Example, view: dict[str, Any], settings: PrepareSettings) -> dict[str, Any]:
    return {
        "row": number,
        "kind": task.name,
        "prompt": example.prompt,
        "teacher_prompt": teacher_view(task, example, settings.template),
        **view,
        "demonstration": example.demonstration,
        "question": example.question,
        "answer": example.answer,
        "choices": list(example.choices),
        "tests": list(example.tests),
    }


def _keep(reading: Reading, kept: Sequence[bool]) -> None:
    reading.examples = [example for example, keep in zip(reading.examples, kept, strict=True) if keep]
    reading.numbers = [number for number, keep in zip(reading.numbers, kept, strict=True) if keep]


@contextmanager
def _timed(report: PrepareReport, name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    report.seconds[name] = round(time.perf_counter() - started, 2)
