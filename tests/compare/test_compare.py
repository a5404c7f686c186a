"""Runs side by side: what is read of a folder, what is compared with what, and a page that stands alone."""

import itertools
import json
import random
import re
from html.parser import HTMLParser

import pytest

from unisd.cli import main
from unisd.compare import figures, load_run
from unisd.compare.beside import differing_settings
from unisd.compare.completions import completions_side_by_side
from unisd.compare.groups import group_runs
from unisd.compare.tables import mean_gain, score_table


def write_run(folder, right, *, trained=True, secret=False, lr=1e-3, reply="<b>so & so</b>"):
    """A folder as `unisd train` and `unisd eval` leave it; `right` are the numbers of the items that are right."""
    (folder / "eval").mkdir(parents=True)
    rows = []
    for number in range(20):
        value = float(number in right)
        row = {"number": number, "group": "", "strict": value, "lenient": value}
        if not secret:
            row |= {"prompt": f"question {number}?", "gold": "A", "reply": reply, "found": "A"}
        rows.append(row)
    share = len(right) / 20
    interval = {"value": share, "low": max(0.0, share - 0.2), "high": min(1.0, share + 0.2), "count": 20}
    result = {"benchmark": "cos_e", "kind": "choice", "scores": {"strict": interval, "lenient": interval}}
    (folder / "eval" / "cos_e.json").write_text(json.dumps({**result, "environment": {"torch": "2.13"}}))
    (folder / "eval" / "cos_e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if trained:
        (folder / "unisd_config.yaml").write_text(f"learning_rate: {lr}\nseed: 42\noutput_dir: {folder}\n")
        log = [
            {"step": step, "loss": 2.0 / step, "unisd/drift_kl": lr * step, "unisd/peak_memory_gib": 1.0 + step / 10}
            for step in range(1, 6)
        ]
        log += [{"step": 5, "loss": float("nan")}, {"step": 5, "train_runtime": 12.5}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


@pytest.fixture
def folders(tmp_path):
    return [
        write_run(tmp_path / "base", range(5), trained=False),
        write_run(tmp_path / "better", range(15)),
        write_run(tmp_path / "other", [*range(1, 5), 19], lr=2e-3),
    ]


def test_differences_are_of_the_same_items(folders):
    runs = group_runs([load_run(folder) for folder in folders])
    base, better, other = score_table(runs)["cos_e"]
    assert (base.value, base.difference, base.verdict) == (0.25, None, "")
    assert better.difference.value == pytest.approx(0.5)
    assert better.verdict == "better"
    assert other.difference.value == 0.0
    assert other.verdict == ""
    assert [gain.value for gain in mean_gain(score_table(runs), runs)] == [0.0, pytest.approx(0.5), 0.0]
    backwards = score_table([runs[1], runs[0]])["cos_e"][1]
    assert (backwards.difference.value, backwards.verdict) == (pytest.approx(-0.5), "worse")


def test_other_items_are_not_compared(folders):
    lines = (folders[1] / "eval" / "cos_e.jsonl").read_text().splitlines()[:-1]
    (folders[1] / "eval" / "cos_e.jsonl").write_text("\n".join(lines) + "\n")
    runs = group_runs([load_run(folder) for folder in folders])
    assert score_table(runs)["cos_e"][1].difference is None
    assert mean_gain(score_table(runs), runs)[1] is None


def test_items_of_one_number_and_another_prompt_are_others(folders):
    file = folders[1] / "eval" / "cos_e.jsonl"
    file.write_text(file.read_text().replace("question 3?", "question 30?"))
    runs = [load_run(folder) for folder in folders]
    assert [score.difference is None for score in score_table(group_runs(runs))["cos_e"]] == [True, True, False]
    numbers = {item["number"] for item in completions_side_by_side(runs, most=20)["cos_e"]}
    assert numbers == set(range(20)) - {3}


def test_replies_may_hold_any_end_of_a_line(tmp_path):
    folder = write_run(tmp_path / "a", range(3), reply="one\u2028two\x85three\n")
    file = folder / "eval" / "cos_e.jsonl"
    rows = [json.loads(line) for line in file.read_text().split("\n") if line]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert load_run(folder).benchmarks["cos_e"].rows[19]["reply"] == "one\u2028two\x85three\n"


def test_what_a_folder_says(folders):
    base, better, other = (load_run(folder) for folder in folders)
    assert (base.drift_kl, base.seconds, base.peak_memory, base.history) == (None, None, None, ())
    assert (better.drift_kl, better.seconds, better.peak_memory) == (5e-3, 12.5, 1.5)
    assert better.curve("loss") == [(float(step), 2.0 / step) for step in range(1, 6)]
    assert differing_settings(group_runs([base, better, other])) == {"learning_rate": ["-", "0.001", "0.002"]}


def test_items_on_which_runs_disagree_come_first(folders):
    runs = [load_run(folder) for folder in folders]
    items = completions_side_by_side(runs, most=14)["cos_e"]
    assert [item["number"] for item in items[:3]] == [0, 5, 6]
    numbers = [item["number"] for item in items]
    assert numbers[11:] == [19, 1, 2]
    assert [reply["score"] for reply in items[0]["replies"]] == [1.0, 1.0, 0.0]


class Checker(HTMLParser):
    """Open tags, and everything that a page would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "br", "img", "link", "input", "circle", "line", "polyline"):
            self.open.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href")]

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("polyline", "circle"):
            assert self.open.pop() == tag


def test_the_page_stands_alone_and_escapes_what_models_write(folders, tmp_path, capsys):
    (folders[1] / "eval" / "drift.json").write_text(
        json.dumps({key: {"perplexity": {"value": 2.5}} for key in ("of_tuned", "of_base")} | {"jsd": {"value": 0.01}})
    )
    assert main(["compare", *map(str, folders), "-o", str(tmp_path / "out"), "--title", "a <b> c"]) == 0
    text = (tmp_path / "out" / "compare.html").read_text()
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.fetched == []
    assert "script" not in checker.tags
    assert "<b>so" not in text
    assert "&lt;b&gt;so &amp; so&lt;/b&gt;" in text
    assert "<title>a &lt;b&gt; c</title>" in text
    assert text.count("<svg") == 3  # gain against drift, loss, drift
    assert text.index('class="finding better"') < text.index("<table>") < text.index("<svg")
    assert re.search(r"25\.0% &rarr; <b>75\.0%</b>, \+50\.0 points \[.*\]\s+on 20 items: <b", text)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert re.search(r'class="better">\+50\.0 \[', text)
    written = (tmp_path / "out" / "compare.md").read_text()
    assert written.strip() in capsys.readouterr().out
    assert "| better | 75.0% [55.0%, 95.0%], +50.0 [" in written
    assert "| better | 0.005 | 2.5 | 2.5 | 0.01 | - | 12.5 | 1.5 | - |" in written


def test_texts_of_a_secret_benchmark_are_not_asked_for(tmp_path, capsys):
    folders = [write_run(tmp_path / name, range(n), secret=True) for name, n in (("a", 4), ("b", 9))]
    assert main(["compare", *map(str, folders), "-o", str(tmp_path / "out")]) == 0
    assert "Completions side by side" not in (tmp_path / "out" / "compare.html").read_text()


def test_mistakes_are_named(folders, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    twin = write_run(tmp_path / "elsewhere" / "base", range(3))
    for words, message in (
        ([str(tmp_path / "nothing")], "there is no such folder"),
        ([str(tmp_path / "empty")], "is no run: it holds neither trainer_state.json"),
        ([str(folders[0]), str(twin)], "two runs have the name 'base'"),
    ):
        assert main(["compare", *words, "-o", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    (folders[0] / "eval" / "cos_e.json").write_text("{")
    assert main(["compare", str(folders[0])]) == 2
    assert "cos_e.json is not JSON" in capsys.readouterr().err


def test_marks_are_round_and_span_the_values():
    draw = random.Random(0)
    for _ in range(300):
        values = [draw.uniform(-1, 1) * 10.0 ** draw.randint(-4, 4) for _ in range(draw.randint(1, 5))]
        marks = figures._marks(values)
        assert 2 <= len(marks) <= 7
        assert marks == sorted(set(marks))
        slack = 1e-9 * (marks[-1] - marks[0])
        assert marks[0] - slack <= min(values) <= max(values) <= marks[-1] + slack
    assert figures._marks([0.0]) == figures._marks([0.0, 0.0])
    assert figures._marks([1.0, 2.0], whole=True) == [1.0, 2.0]
    assert all(mark.is_integer() for mark in figures._marks([0.0, 10.0], whole=True))


def test_nothing_to_draw():
    one = figures.Ranged(1.0, 1.0, 1.0)
    assert figures.lines([(0, "a", [(0.0, 1.0)])], "x", "y") is None
    assert figures.scatter([(0, "a", one, one)], "x", "y") is None


def test_names_of_dots_do_not_hide_each_other():
    near = [figures.Ranged(0.5 + 0.001 * n, 0.5, 0.6) for n in range(5)]
    drawing = figures.scatter([(n, f"a long name {n}", near[n], near[n]) for n in range(5)], "x", "y")
    heights = sorted(dot.text_y for dot in drawing.dots)
    assert all(later - former >= 13 for former, later in itertools.pairwise(heights))
    assert all(0 < height <= drawing.bottom for height in heights)
    assert all(dot.left < dot.x < dot.right for dot in drawing.dots[1:])
