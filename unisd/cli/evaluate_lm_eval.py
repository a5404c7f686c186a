"""`unisd eval BENCHMARK --via lm-eval`: by EleutherAI's lm-evaluation-harness, in the form of our own results."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from unisd.benchmarks import benchmarks
from unisd.cli.errors import CommandError, setting_up
from unisd.evaluation.lm_eval import checked_rows, evaluate_lm_eval, task_of
from unisd.prepare.sources import load_rows
from unisd.sandbox import Sandbox

IDLE = ("split", "seed", "likelihood", "generator")
"""Options that the harness's tasks leave no room for."""


def check(options: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """Raise CommandError for an option without effect, and ValueError for a benchmark that the harness has not."""
    for name in IDLE:
        if getattr(options, name) != getattr(defaults, name):
            raise CommandError(f"--{name} has no effect with --via lm-eval, whose task decides it")
    for name in options.names:
        task = task_of(name)
        if task.kind == "code":
            Sandbox(options.unsafe_code)


def given_rows(options: argparse.Namespace) -> list[dict[str, Any]] | None:
    """The rows of --data, or None.

    Raises:
        ValueError: a file that cannot be read, or without what the task reads.
    """
    if options.data is None:
        return None
    (name,) = options.names
    rows = load_rows(options.data, split=benchmarks()[name].default_split)
    checked_rows(task_of(name), rows[: options.limit])
    return rows[: options.limit]


def results(
    options: argparse.Namespace, loaded: tuple[Any, Any], rows: list[dict[str, Any]] | None, device: torch.device
) -> Any:
    """(scores, what stands beside them in the file) of each benchmark, as it is done."""
    for name in dict.fromkeys(options.names):
        started = time.perf_counter()
        with setting_up():
            scores = evaluate_lm_eval(
                benchmarks()[name],
                *loaded,
                rows,
                limit=options.limit,
                batch_size=options.batch_size or 8,
                max_new_tokens=options.max_new_tokens,
                unsafe_code=options.unsafe_code,
            )
        longest = f", at most {options.max_new_tokens} tokens" if options.max_new_tokens else ""
        decoding = f"greedy{longest}" if scores.task.kind == "code" else "log-probability of the options' texts"
        yield scores, {"decoding": f"{decoding}, as lm-eval's task has it"}, time.perf_counter() - started
