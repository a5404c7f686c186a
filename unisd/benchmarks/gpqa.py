"""GPQA: questions that search does not answer. For evaluation only; its authors ask that its texts be shown nowhere."""

from unisd.benchmarks.base import Benchmark

BENCHMARK = Benchmark(
    name="gpqa",
    kind="choice",
    hub="Idavidrein/gpqa",
    splits={"test": ("gpqa_main", "train")},  # all of it; on the hub its one split is called "train"
    source="Rein et al. 2023, arXiv 2311.12022",
    licence="CC BY 4.0; gated",
    group="High-level domain",
    evaluation_only=True,
    secret=True,
)
