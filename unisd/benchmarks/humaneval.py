"""HumanEval: functions to complete from signature and docstring. For evaluation only."""

from unisd.benchmarks.base import Benchmark

BENCHMARK = Benchmark(
    name="humaneval",
    kind="code",
    hub="openai/openai_humaneval",
    splits={"test": (None, "test")},
    source="Chen et al. 2021, arXiv 2107.03374",
    licence="MIT",
    evaluation_only=True,
)
