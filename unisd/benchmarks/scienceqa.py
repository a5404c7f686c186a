"""ScienceQA: school science, the questions without a picture."""

from unisd.benchmarks.base import Benchmark, Row


def _without_picture(row: Row) -> Row | None:
    return None if row.get("image") is not None else row


BENCHMARK = Benchmark(
    name="scienceqa",
    kind="choice",
    hub="derek-thomas/ScienceQA",
    splits={name: (None, name) for name in ("train", "validation", "test")},
    source="Lu et al. 2022, arXiv 2209.09513",
    licence="CC BY-NC-SA 4.0",
    adapt=_without_picture,
    group="subject",
)
