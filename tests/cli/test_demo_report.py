"""The demo's report: a comparison of before and after, with the finding first."""

import json
import sys
from html.parser import HTMLParser

import pytest

from tests.compare.evaluated import write_all
from tests.compare.test_compare import Checker, write_run
from unisd.cli.demo import write_report


class Unfolded(HTMLParser):
    """The text that stands outside of <details> and <style>, as a reader sees it at first."""

    def __init__(self):
        super().__init__()
        self.depth, self.text, self.figures, self.tables = 0, "", 0, 0

    def handle_starttag(self, tag, attributes):
        self.depth += tag in ("details", "style")
        self.figures += tag == "svg" and not self.depth
        self.tables += tag == "table" and not self.depth

    def handle_endtag(self, tag):
        self.depth -= tag in ("details", "style")

    def handle_data(self, data):
        self.text += "" if self.depth else data


@pytest.fixture
def folder(tmp_path):
    run = write_all(write_run(tmp_path / "demo", range(15), lr=0.01), shift=6)
    write_all(run / "before", moved=False)
    for file in ("cos_e.json", "cos_e.jsonl"):
        (run / "eval" / file).unlink()
    for file in (run / "before" / "eval").iterdir():
        file.rename(run / "before" / file.name)
    (run / "before" / "eval").rmdir()
    state = json.loads((run / "trainer_state.json").read_text())
    for entry in state["log_history"][:5]:
        entry |= {f"unisd/{name}": 0.5 * entry["step"] for name in ("divergence", "contrastive", "agreement_weight")}
    (run / "trainer_state.json").write_text(json.dumps(state))
    return run


def test_the_finding_is_first_then_the_few_figures_that_matter_and_the_rest_is_folded(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/unisd", "demo", "--output", "a b"])
    file = write_report(folder, ["A note <b>."], {"steps trained": 30})
    assert file == folder / "report.html"
    text = file.read_text()
    checker = Checker()
    checker.feed(text)
    assert (checker.open, checker.fetched) == ([], [])
    assert "script" not in checker.tags
    seen = Unfolded()
    seen.feed(text)
    said = " ".join(seen.text.split())
    assert "procedural: 25.0% → 75.0%, +50.0 points [" in said
    assert "on 12 items: significantly better, the interval leaves out 0." in said
    assert "perplexity of the right reply, procedural: 2 → 1.4, -0.6 nats a token [" in said
    assert said.index("→") < said.index("A note <b>.") < said.index("Gain against drift")
    captions = [
        "Gain against drift", "accuracy by number of steps", "perplexity of the right reply by number of steps",
        "loss", "KL from the base",
    ]  # fmt: skip
    assert all(caption in said for caption in captions)
    assert seen.tables == 0
    # The diagnostic of this fixture has one of its own.
    assert seen.figures == len(captions) + 1
    assert "contrastive term" not in said
    assert "contrastive term" in text
    assert "unisd demo --output &#39;a b&#39;" in text
    assert "somewhere" not in text
    assert "<th>learning_rate</th>" in text
    assert "retention, KL" in text
    assert text.index("Where it was run") > text.index("All settings of the run")


def test_no_change_that_the_items_can_show_is_said_to_be_none(folder):
    write_all(folder, shift=0)
    write_report(folder, [], {})
    seen = Unfolded()
    seen.feed((folder / "report.html").read_text())
    said = " ".join(seen.text.split())
    assert (
        "procedural: 25.0% → 25.0%, +0.0 points [+0.0, +0.0] on 12 items: not significant, the interval holds 0."
        in said
    )
    assert "significantly" not in said
