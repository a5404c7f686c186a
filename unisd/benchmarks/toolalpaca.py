"""ToolAlpaca: instructions for an interface, to be met with calls of its functions; a row an instruction."""

from unisd.benchmarks.base import Benchmark

BENCHMARK = Benchmark(
    name="toolalpaca",
    kind="tools",
    hub="",
    splits={"train": (None, "train"), "test": (None, "test")},
    source="Tang et al. 2023, arXiv 2306.05301",
    licence="Apache-2.0",
    where="give its file of instructions with gold answers (data/eval_simulated.json of its repository)",
)
