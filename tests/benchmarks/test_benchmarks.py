"""The benchmarks: their original formats, what may be done with them, and how a new one comes in."""

import gzip
import json
import sys

import pytest

import unisd.benchmarks as room
from tests.tasks.rows import COS_E, GPQA, HUMANEVAL, MBPP, SANITIZED, SCIENCE, TOOLS
from unisd.benchmarks import Benchmark, base, benchmarks, is_benchmark, rows_to_train_on
from unisd.tasks import read_rows

ARC = {
    "id": "x",
    "question": "What floats?",
    "choices": {"text": ["lead", "cork"], "label": ["1", "2"]},
    "answerKey": "2",
}
ORIGINAL = {
    "scienceqa": ([SCIENCE, {**SCIENCE, "image": {"bytes": b""}}], 1),
    "cos_e": ([COS_E], 1),
    "gpqa": ([GPQA], 1),
    "mbpp": ([MBPP, SANITIZED], 2),
    "humaneval": ([HUMANEVAL], 1),
    "toolalpaca": ([TOOLS], 1),
    "arc_challenge": ([ARC], 1),
}


def test_every_benchmark_is_tried_here():
    assert set(ORIGINAL) == set(benchmarks())


@pytest.mark.parametrize("name", ORIGINAL)
def test_rows_in_the_original_format_are_read(name, monkeypatch):
    benchmark, (rows, count) = benchmarks()[name], ORIGINAL[name]
    asked = []

    def load_rows(source, *, split, config=None):
        asked.append((source, split, config))
        return rows

    monkeypatch.setattr(base, "load_rows", load_rows)
    kept = benchmark.rows(benchmark.default_split, None if benchmark.hub else "rows.json")
    assert len(kept) == count
    config, split = benchmark.splits[benchmark.default_split]
    assert asked == [(benchmark.hub, split, config) if benchmark.hub else ("rows.json", "test", None)]
    for row in kept:
        reading = read_rows([row], kind=benchmark.kind)
        assert reading.examples
        assert not reading.rejected
    if name == "arc_challenge":
        (example,) = read_rows(kept, shuffle_choices=False).examples
        assert (example.choices, example.answer) == (("lead", "cork"), "B")


def test_a_packed_file_is_read(tmp_path):
    file = tmp_path / "HumanEval.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(HUMANEVAL).encode()))
    assert benchmarks()["humaneval"].rows("test", str(file)) == [HUMANEVAL]


def test_what_is_not_there_is_said(tmp_path, monkeypatch):
    found = benchmarks()
    with pytest.raises(ValueError, match=r"toolalpaca is not on the hub: give its file of instructions"):
        found["toolalpaca"].rows("test")
    with pytest.raises(ValueError, match=r"cos_e has the splits train, validation, not 'test'"):
        found["cos_e"].rows("test")
    assert found["cos_e"].default_split == "validation"
    monkeypatch.setattr(base, "load_rows", lambda *_, **__: [{**SCIENCE, "image": "a picture"}])
    with pytest.raises(ValueError, match="none of its 1 rows belongs to scienceqa"):
        found["scienceqa"].rows("test")


@pytest.mark.parametrize("name", ["gpqa", "humaneval"])
def test_training_on_what_is_for_evaluation_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is for evaluation only: unisd eval {name}"):
        rows_to_train_on(name, "test")


def test_a_file_of_that_name_is_the_file(tmp_path, monkeypatch):
    assert is_benchmark("mbpp")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mbpp").mkdir()
    assert not is_benchmark("mbpp")
    assert not is_benchmark("another")


def test_a_new_benchmark_is_a_file_in_the_room(tmp_path, monkeypatch):
    (tmp_path / "riddles.py").write_text(
        "from unisd.benchmarks.base import Benchmark\n"
        "BENCHMARK = Benchmark('riddles', 'open', 'somebody/riddles', {'test': (None, 'test')}, 'a book', 'none')\n"
    )
    (tmp_path / "notes.py").write_text("BENCHMARK = 3\n")
    monkeypatch.setattr(room, "__path__", [*room.__path__, str(tmp_path)])
    try:
        assert benchmarks()["riddles"] == Benchmark(
            "riddles", "open", "somebody/riddles", {"test": (None, "test")}, "a book", "none"
        )
        assert "notes" not in benchmarks()
    finally:
        for name in ("riddles", "notes"):
            sys.modules.pop(f"unisd.benchmarks.{name}", None)
