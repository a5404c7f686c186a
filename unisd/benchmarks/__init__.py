"""The benchmarks by name. One file each: a file in this folder that defines `BENCHMARK` is one."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

from unisd.benchmarks.base import Benchmark

__all__ = ["Benchmark", "benchmarks", "is_benchmark", "rows_to_train_on"]


def benchmarks() -> dict[str, Benchmark]:
    """All of them by name."""
    found = {}
    for entry in pkgutil.iter_modules(__path__):
        benchmark = getattr(importlib.import_module(f"{__name__}.{entry.name}"), "BENCHMARK", None)
        if isinstance(benchmark, Benchmark):
            found[benchmark.name] = benchmark
    return found


def is_benchmark(source: str) -> bool:
    """Whether a source of rows is the name of a benchmark, and not of a file or folder here."""
    return source in benchmarks() and not Path(source).expanduser().exists()


def rows_to_train_on(name: str, split: str) -> list[dict[str, Any]]:
    """Rows of a benchmark to train on.

    Raises:
        ValueError: one that is for evaluation only, and see `Benchmark.rows`.
    """
    benchmark = benchmarks()[name]
    if benchmark.evaluation_only:
        raise ValueError(f"{name} is for evaluation only: unisd eval {name}")
    return benchmark.rows(split)
