"""Prompts of a task with their gold completions, from a benchmark, the generators, a file or a prepared folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from unisd.benchmarks import benchmarks, is_benchmark
from unisd.data.diagnostic import DiagnosticSettings, diagnostic_rows
from unisd.data.procedural import procedural_rows
from unisd.prepare.sources import load_rows
from unisd.tasks import read_rows
from unisd.turns import Prompt, as_prompt

GENERATED = ("procedural", "diagnostic")


@dataclass(frozen=True)
class TaskPrompts:
    """Prompts of one task.

    Attributes:
        source: as it was named; of a file its name.
        split: of it; None for a file, which has none.
        prompts: as an evaluation of the task asks.
        golds: the completion that supervised training would learn, for each.
    """

    source: str
    split: str | None
    prompts: tuple[Prompt, ...]
    golds: tuple[str, ...]


def task_prompts(
    source: str,
    count: int,
    *,
    split: str | None = None,
    file: str | None = None,
    chats: bool = True,
    seed: int = 0,
    num_steps: Sequence[int] | None = None,
    look_back: int = 1,
) -> TaskPrompts:
    """The first prompts of a task.

    Args:
        source: "procedural", "diagnostic", the name of a benchmark, a file of questions and answers, a folder of
            `unisd prepare`, or an id of the hub.
        count: at most so many.
        split: None for the test's, or what the benchmark has in its place.
        file: of a benchmark, in its original format, in place of the hub.
        chats: whether the model reads messages (it has a chat template) or plain text.
        seed, num_steps, look_back: of generated tasks.

    Raises:
        ValueError: a source that cannot be read, a file of something else than a benchmark, an argument without effect,
            or no row of use.
    """
    if file is not None and not is_benchmark(source):
        raise ValueError(f"a file in a benchmark's format goes with the name of one of {', '.join(benchmarks())}")
    of_file = file or (source if Path(source).expanduser().is_file() else None)
    if of_file is not None and split is not None:
        raise ValueError(f"{of_file} is a file, which has no split {split!r}")
    if source not in GENERATED and (num_steps is not None or look_back != 1 or seed != 0):
        raise ValueError(f"numbers of steps, look-back and seed are of {' and '.join(GENERATED)}, not of {source}")
    if source in GENERATED:
        steps: Any = {} if num_steps is None else {"num_steps": tuple(num_steps)}
        part = split or "test"
        if source == "procedural":
            rows = procedural_rows(count, seed=seed, split=part, look_back=look_back, num_auxiliary=0, **steps)
        else:
            settings = DiagnosticSettings(seed=seed, split=part, look_back=look_back, **steps)
            rows = diagnostic_rows(count, settings, num_auxiliary=0)
        return _with_views(source, part, rows)
    if is_benchmark(source):
        benchmark = benchmarks()[source]
        part = split or benchmark.default_split
        raw: Sequence[Mapping[str, Any]] = benchmark.rows(part, file)
        return _read(source, None if file else part, raw, benchmark.kind, count, chats)
    from unisd.prepare.folder import is_prepared, load_prepared  # which loads `datasets`

    if is_prepared(source):
        return _with_views(source, None, list(islice(load_prepared(source), count)))
    name = source if of_file is None else Path(of_file).name
    return _read(name, split, load_rows(source, split=split or "test"), None, count, chats)


def _with_views(source: str, split: str | None, rows: Sequence[Mapping[str, Any]]) -> TaskPrompts:
    prompts, golds = [row["prompt"] for row in rows], [row["demonstration"] for row in rows]
    return TaskPrompts(source, split, tuple(prompts), tuple(golds))


def _read(
    source: str, split: str | None, rows: Sequence[Mapping[str, Any]], kind: str | None, count: int, chats: bool
) -> TaskPrompts:
    reading = read_rows(rows, kind=kind)
    examples = reading.examples[:count]
    if not examples:
        reasons = "; ".join(f"{number} x {reason}" for reason, number in reading.rejected.most_common(5))
        raise ValueError(f"none of the {len(rows)} rows of {source} can be read: {reasons}")
    prompts = [as_prompt(each.prompt, chats) if isinstance(each.prompt, str) else each.prompt for each in examples]
    return TaskPrompts(source, split, tuple(prompts), tuple(each.demonstration for each in examples))
