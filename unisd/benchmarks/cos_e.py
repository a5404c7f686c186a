"""CoS-E: common sense, with explanations that people wrote; version 1.11 (five choices), and 1.0 (three)."""

from unisd.benchmarks.base import Benchmark

BENCHMARK = Benchmark(
    name="cos_e",
    kind="choice",
    hub="Salesforce/cos_e",
    splits={"train": ("v1.11", "train"), "validation": ("v1.11", "validation")},
    source="Rajani et al. 2019, arXiv 1906.02361",
    licence="BSD-3-Clause",
)
