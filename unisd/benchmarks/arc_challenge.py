"""ARC-Challenge: school science that simple methods get wrong. A benchmark more: this file is all of it."""

from unisd.benchmarks.base import Benchmark, Row


def _named(row: Row) -> Row:
    return {"question": row["question"], "choices": row["choices"], "answer": row["answerKey"]}


BENCHMARK = Benchmark(
    name="arc_challenge",
    kind="choice",
    hub="allenai/ai2_arc",
    splits={name: ("ARC-Challenge", name) for name in ("train", "validation", "test")},
    source="Clark et al. 2018, arXiv 1803.05457",
    licence="CC BY-SA 4.0",
    adapt=_named,
)
