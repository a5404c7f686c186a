"""The report shows what it was given, and nothing breaks its HTML."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import transformers

from unisd.evaluation import ProceduralScores, RetentionScores, StepScores
from unisd.evaluation.report import curves, write_report

HISTORY = [
    {"step": 1, "epoch": 0.1, "loss": 0.9, "drift": 0.0, "lr": 1e-4},
    {"step": 2, "epoch": 0.2, "loss": 0.7, "lr": float("nan")},
    {"step": 3, "epoch": 0.3, "loss": 0.6, "drift": 0.02},
    {"step": 3, "train_runtime": 61.25, "total_flos": 0.0},
]
RETENTION = RetentionScores(0.0123, 9.5, 9.75, 480, (0.01,))


def scores(accuracy: float | None, perplexity: float | None) -> ProceduralScores:
    by_steps = tuple(StepScores(steps, 10, accuracy, accuracy, perplexity) for steps in (1, 2))
    return ProceduralScores(by_steps, StepScores(None, 20, accuracy, accuracy, perplexity), ())


class Page(HTMLParser):
    """Text, table rows and image sources of a page; checks that tags are closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        elif tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_it_lists_everything_it_was_given(tmp_path: Path) -> None:
    path = write_report(
        tmp_path / "new" / "folder",
        title="A run",
        history=HISTORY,
        procedural={"before": scores(0.05, 1.75), "after": scores(0.625, 1.25)},
        retention=RETENTION,
        settings={"learning_rate": 2e-5, "preset": "unisd_star"},
        tables={"Samples": [{"question": "x1 = a + b", "reply": "Answer: 3"}]},
        notes=["A note."],
        command="unisd train --preset unisd_star",
    )
    page = Page(path)
    assert path == tmp_path / "new" / "folder" / "report.html"
    assert ["1", "before", "10", "5.0%", "5.0%", "1.75"] in page.rows
    assert ["all", "after", "20", "62.5%", "62.5%", "1.25"] in page.rows
    assert ["KL(base || trained), nats a token", "0.0123"] in page.rows
    assert ["learning_rate", "2e-05"] in page.rows
    assert ["preset", "unisd_star"] in page.rows
    assert ["x1 = a + b", "Answer: 3"] in page.rows
    assert ["train_runtime", "61.25"] in page.rows
    # As the installation calls it, which may leave out what torch adds (+cu128).
    assert ["torch", importlib.metadata.version("torch")] in page.rows
    assert ["transformers", transformers.__version__] in page.rows
    assert any(row[0] == "CPU" and "cores" in row[1] for row in page.rows)
    for text in ("A run", "A note.", "Samples", "unisd train --preset unisd_star"):
        assert text in page.text
    assert sorted(page.images) == ["accuracy.png", "perplexity.png", "training.png"]
    for image in page.images:
        assert (path.parent / image).read_bytes().startswith(b"\x89PNG")


def test_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script> & \"quotes\""
    path = write_report(
        tmp_path,
        title=evil,
        notes=[evil],
        command=evil,
        settings={evil: evil},
        tables={evil: [{evil: evil}]},
        history=[{"step": 1, evil: 1.0}, {"step": 2, evil: 2.0, "x$_$<b>": 3.0}],
        procedural={evil: scores(0.5, 2.0), "_hidden $": scores(0.5, 2.0)},
    )
    page = Page(path)
    assert "script" not in re.findall(r"<(\w+)", path.read_text(encoding="utf-8"))
    assert page.text.count(evil) >= 7


def test_what_was_not_given_is_left_out(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path))
    assert not page.images
    assert "Retention" not in page.text
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_missing_scores_are_shown_as_missing(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path, procedural={"before": scores(None, 1.5)}))
    assert ["1", "before", "10", "-", "-", "1.5"] in page.rows
    assert page.images == ["perplexity.png"]


def test_the_default_command_is_the_process_without_its_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/unisd", "train", "--out", "a b"])
    page = Page(write_report(tmp_path))
    assert "unisd train --out 'a b'" in page.text
    assert "somewhere" not in page.text


def test_curves_keep_what_was_logged_more_than_once() -> None:
    assert curves(HISTORY) == {
        "loss": [(1.0, 0.9), (2.0, 0.7), (3.0, 0.6)],
        "drift": [(1.0, 0.0), (3.0, 0.02)],
    }


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    write_report(tmp_path, title="First")
    page = Page(write_report(tmp_path, title="Second"))
    assert "First" not in page.text


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_curves_fits(tmp_path: Path, count: int) -> None:
    history = [{"step": step, **{f"metric_{n}": float(n * step) for n in range(count)}} for step in (1, 2)]
    assert Page(write_report(tmp_path, history=history)).images == ["training.png"]
