"""MBPP: short Python functions. Trained on the full set's split, evaluated on the sanitized one's."""

from unisd.benchmarks.base import Benchmark

BENCHMARK = Benchmark(
    name="mbpp",
    kind="code",
    hub="google-research-datasets/mbpp",
    splits={"train": ("full", "train"), "validation": ("full", "validation"), "test": ("sanitized", "test")},
    source="Austin et al. 2021, arXiv 2108.07732",
    licence="CC BY 4.0",
)
