"""A benchmark through EleutherAI's lm-evaluation-harness: its task, prompts and metrics, on a model that we loaded.

What is ours: how the model is loaded, the rows where a local file is given, the sandbox in which code runs (the
harness's own metric `code_eval` is fetched from the hub, and runs it unconfined), and the form of the result. Nothing
here is imported before it is used: the package `lm-eval` is an extra.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unisd.benchmarks import Benchmark
from unisd.sandbox import Program, Sandbox
from unisd.scoring import Interval, wilson


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness that has the rows of one of our benchmarks.

    Attributes:
        name: there.
        folder: of its definition, in the package's `tasks`.
        kind: "likelihood" of the options' texts, or "code": see `unisd.scoring.MEASURES`.
        metrics: its metric -> our measure.
        columns: that its templates read, in the original format.
        overrides: of its configuration where the rows come from a file: it has one split then.
    """

    name: str
    folder: str
    kind: str
    metrics: Mapping[str, str]
    columns: tuple[str, ...]
    overrides: Mapping[str, Any] = field(
        default_factory=lambda: {
            "training_split": None,
            "validation_split": None,
            "fewshot_split": None,
            "test_split": "test",
        }
    )


_LIKELIHOOD = {"acc": "acc", "acc_norm": "acc_norm"}
TASKS: dict[str, HarnessTask] = {
    "arc_challenge": HarnessTask(
        "arc_challenge", "arc", "likelihood", _LIKELIHOOD, ("question", "choices", "answerKey")
    ),
    "gpqa": HarnessTask(
        "gpqa_main_zeroshot",
        "gpqa/zeroshot",
        "likelihood",
        _LIKELIHOOD,
        ("Question", "Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3))),
    ),
    "humaneval": HarnessTask("humaneval", "humaneval", "code", {"pass@1": "pass@1"}, ("prompt", "test", "entry_point")),
    "mbpp": HarnessTask("mbpp", "mbpp", "code", {"pass_at_1": "pass@1"}, ("text", "test_list")),
}
"""Benchmark -> its task there."""


@dataclass(frozen=True)
class HarnessScores:
    """Scores of a model by the harness.

    Attributes:
        benchmark: of ours.
        task: of the harness.
        version: of the package.
        task_version: of the task.
        rows: one an item: number, measures, and unless the benchmark is secret prompt, gold answer and reply.
        settings: what the harness was asked for.
    """

    benchmark: Benchmark
    task: HarnessTask
    version: str
    task_version: str
    rows: tuple[dict[str, Any], ...]
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Beside our own evaluation of the benchmark it is another one."""
        return f"{self.benchmark.name} (lm-eval)"

    @property
    def measures(self) -> dict[str, Interval]:
        """Share of each measure with Wilson's 95% interval."""
        names = self.task.metrics.values()
        return {name: wilson(round(sum(row[name] for row in self.rows)), len(self.rows)) for name in names}

    def as_dict(self) -> dict[str, Any]:
        """For JSON, in the form of `BenchmarkScores.as_dict`."""
        return {
            "benchmark": self.name,
            "kind": self.task.kind,
            "via": f"lm-eval {self.version}",
            "task": {"name": self.task.name, "version": self.task_version, **self.settings},
            "items": len(self.rows),
            "dropped": {},
            "scores": {name: interval.as_dict() for name, interval in self.measures.items()},
            "groups": {},
        }

    def completions(self) -> Iterator[dict[str, Any]]:
        """A row for each item."""
        yield from self.rows

    def table(self) -> str:
        """For a terminal."""
        lines = [f"{self.name}: {len(self.rows)} items, task {self.task.name} of lm-eval {self.version}"]
        return "\n".join([*lines, *(f"  {name:<20} {score.percent()}" for name, score in self.measures.items())])


def task_of(benchmark: str) -> HarnessTask:
    """The harness's task of a benchmark.

    Raises:
        ValueError: it has none, or the package is not installed.
    """
    if benchmark not in TASKS:
        raise ValueError(
            f"lm-evaluation-harness has no task with the rows of {benchmark}; it has one of {', '.join(TASKS)}"
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--via lm-eval needs EleutherAI's package: pip install 'unisd-kernels[lm-eval]'")
    return TASKS[benchmark]


def checked_rows(task: HarnessTask, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Those columns of the rows of a file that the task reads.

    Raises:
        ValueError: a row lacks one: the harness would write a prompt with a hole.
    """
    for number, row in enumerate(rows, 1):
        missing = [name for name in task.columns if row.get(name) in (None, "")]
        if missing:
            raise ValueError(
                f"row {number} has no {', '.join(missing)}: the task {task.name} of lm-evaluation-harness reads the "
                f"columns {', '.join(task.columns)} of the original format"
            )
    return [{name: row[name] for name in task.columns} for row in rows]


def evaluate_lm_eval(
    benchmark: Benchmark,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]] | None = None,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    unsafe_code: bool = False,
) -> HarnessScores:
    """Scores of a model by the harness: its task as it stands, without a chat template.

    Args:
        benchmark: one of `TASKS`.
        model, tokenizer: as `unisd.models.load_model` gives them, an adapter's too.
        rows: of a file in the original format, in place of the harness's dataset of the hub.
        limit: the first rows only.
        batch_size: requests together.
        max_new_tokens: longest reply; None for the task's own.
        unsafe_code: run code without bubblewrap, see `unisd.sandbox.Sandbox`.

    Raises:
        ValueError: no such task, the package is missing, rows without what the task reads, no sandbox for code.
    """
    task = task_of(benchmark.name)
    entry: str | dict[str, Any] = task.name
    if rows is not None:
        kept = checked_rows(task, rows)
        replaced = {"task": task.name, "custom_dataset": lambda **_: _dataset(kept), **task.overrides}
        # Alone it would be a task of its own; in a group it is the harness's with these entries replaced.
        entry = {"group": "local", "task": [replaced]}
    sandbox = Sandbox(unsafe_code) if task.kind == "code" else None
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # To read the definitions of all its tasks takes long.
    definitions = Path(lm_eval.__file__).parent / "tasks" / task.folder
    with _code_eval(sandbox):
        found = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=[entry],
            task_manager=TaskManager(include_defaults=False, include_path=str(definitions)),
            limit=limit,
            gen_kwargs=None if max_new_tokens is None else {"max_gen_toks": max_new_tokens},
            bootstrap_iters=0,
            confirm_run_unsafe_code=sandbox is not None,
        )
    samples = sorted(found["samples"][task.name], key=lambda sample: sample["doc_id"])
    return HarnessScores(
        benchmark,
        task,
        importlib.metadata.version("lm_eval"),
        str(found["versions"].get(task.name)),
        tuple(_row(sample, task, benchmark.secret) for sample in samples),
        {"num_fewshot": found["n-shot"].get(task.name), "chat_template": False},
    )


def _dataset(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(rows)}


def _row(sample: Mapping[str, Any], task: HarnessTask, secret: bool) -> dict[str, Any]:
    """One item, as `BenchmarkScores.completions` has it."""
    values = {measure: float(sample[metric]) for metric, measure in task.metrics.items()}
    row = {"number": int(sample["doc_id"]), "group": "", **values}
    if secret:
        return row
    arguments, gold = sample["arguments"], sample["target"]
    if task.kind == "likelihood":
        # One request an option: its text, with the log-probability of which the largest is the reply.
        options = [str(request[1]).strip() for request in arguments]
        scores = [float(response[0]) for response in sample["filtered_resps"]]
        reply = options[scores.index(max(scores))]
        gold = options[int(gold)] if str(gold).isdigit() else gold
    else:
        reply = sample["resps"][0][0]
    return {**row, "prompt": str(arguments[0][0]), "gold": str(gold), "reply": str(reply), "found": ""}


class _CodeEval:
    """What the metric `code_eval` of the package `evaluate` does, in our sandbox."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int]
    ) -> tuple[dict[str, float], dict[int, Any]]:
        """The share of problems whose first program satisfies the reference's tests."""
        if list(k) != [1]:
            raise ValueError(f"code is tried once a problem, and the task asks for pass@{k}")
        passed = [
            self._sandbox.run(Program(programs[0], (tests,))).passed
            for tests, programs in zip(references, predictions, strict=True)
        ]
        return {"pass@1": sum(passed) / len(passed)}, {}


@contextmanager
def _code_eval(sandbox: Sandbox | None) -> Iterator[None]:
    """Let the harness's tasks of code find `code_eval` without the hub."""
    if sandbox is None:
        yield
        return
    import evaluate

    original = evaluate.load

    def load(path: str, *arguments: Any, **options: Any) -> Any:
        return _CodeEval(sandbox) if path == "code_eval" else original(path, *arguments, **options)

    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = original
