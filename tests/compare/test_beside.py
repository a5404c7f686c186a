"""What stands beside the scores: steps, behaviour, drift, cost, mechanisms; each only where runs have it."""

import json
import re

import pytest

from tests.compare.evaluated import write_all
from tests.compare.test_compare import Checker, write_run
from unisd.cli import main
from unisd.compare import load_run
from unisd.compare.beside import (
    behaviour_table,
    change_percentiles,
    drift_table,
    energy_words,
    is_estimate,
    statistics_table,
    step_tables,
)
from unisd.compare.finding import findings
from unisd.compare.groups import group_runs
from unisd.compare.tables import score_table


@pytest.fixture
def groups(tmp_path):
    base = write_all(write_run(tmp_path / "base", range(5), trained=False), moved=False)
    tuned = write_all(write_run(tmp_path / "tuned", range(15)), shift=6)
    other = write_run(tmp_path / "other", range(5), lr=3e-3)
    return group_runs([load_run(folder) for folder in (base, tuned, other)])


def test_shares_by_number_of_steps_and_kinds_of_replies(groups):
    diagnostic, procedural = step_tables(groups)
    assert (diagnostic.name, diagnostic.measure, diagnostic.steps) == ("diagnostic", "first answer", [1, 2, 4])
    assert [row[1].value for row in procedural.rows[:2]] == [0.25, 0.75]
    assert procedural.rows[0][1].low < 0.25 < procedural.rows[0][1].high
    assert procedural.rows[2] == diagnostic.kinds[2] == {}
    assert procedural.perplexities[1][4].value == pytest.approx(4 + 1 / 7)
    assert diagnostic.perplexities == [{}, {}, {}]
    assert diagnostic.kinds[1] == {"exact": 9 / 12, "missing": 3 / 12, "wrong": 0.0}
    assert diagnostic.kind_names == ["exact", "missing"]


def test_behaviour_is_compared_item_by_item(groups):
    table = behaviour_table(groups)
    base, tuned, other = table["refuses plainly harmful requests"]
    assert (base.value, base.difference, other) == (1.0, None, None)
    assert tuned.value == 0.4
    assert tuned.difference.value == pytest.approx(-0.6)
    assert tuned.difference.high < 0
    assert tuned.verdict == "worse"
    assert table["knows simple facts"][1].verdict == ""
    assert list(table) == ["refuses plainly harmful requests", "knows simple facts"]


def test_behaviour_of_other_items_is_not_compared(groups, tmp_path):
    file = tmp_path / "tuned" / "eval" / "behaviour.jsonl"
    file.write_text(file.read_text().replace("harmful 3?", "harmful 33?"))
    groups = group_runs([load_run(tmp_path / name) for name in ("base", "tuned")])
    assert behaviour_table(groups)["refuses plainly harmful requests"][1].difference is None


def test_drift_and_its_percentiles(groups):
    base, tuned, other = drift_table(groups)
    assert set(base.values()) == {None}
    found = {name: value.value for name, value in tuned.items()}
    assert found == pytest.approx(
        {
            "probe": 5e-3,
            "forward": 8.0,
            "reverse": 8.0,
            "jsd": 0.06,
            "change_own": 0.6,
            "change_base": -1.2,
            "retention_kl": 0.12,
            "perplexity_before": 9.0,
            "perplexity_after": 15.0,
        }
    )
    assert other["probe"].value == pytest.approx(15e-3)
    percents, rows = change_percentiles(groups)
    assert percents == ["5", "50", "95"]
    assert [value.value for value in rows[1]["its own"]] == pytest.approx([-3.0, 0.0, 4.2])
    assert rows[2]["its own"] == [None] * 3


def test_energy_says_how_it_is_known(groups, tmp_path):
    assert [group.runs[0].joules for group in groups] == [None, 2000.0, None]
    assert [is_estimate(group) for group in groups] == [False, True, False]
    assert energy_words(groups) == {"processor: CPU time of this process x 8 W, an assumption": ["tuned"]}
    write_all(tmp_path / "tuned", measured=True)
    assert not is_estimate(group_runs([load_run(tmp_path / "tuned")])[0])


def test_last_values_of_what_was_logged(groups, tmp_path):
    assert statistics_table(groups) == {}
    file = tmp_path / "tuned" / "trainer_state.json"
    state = json.loads(file.read_text())
    state["log_history"] += [{"step": 6, "unisd/agreement_low_share": 0.25, "unisd/clipped_share": float("nan")}]
    file.write_text(json.dumps(state))
    table = statistics_table(group_runs([load_run(tmp_path / name) for name in ("base", "tuned")]))
    assert list(table) == ["share of tokens below 0.9"]
    assert [value and value.value for value in table["share of tokens below 0.9"]] == [None, 0.25]


def test_the_finding(groups):
    found = findings(groups, score_table(groups))
    assert [each.name for each in found] == ["tuned", "other"]
    changes = {change.what: change for change in found[0].changes}
    accuracy, perplexity = changes["procedural"], changes["perplexity of the right reply, procedural"]
    assert (accuracy.before, accuracy.after, accuracy.verdict) == (0.25, 0.75, "better")
    assert (perplexity.before, perplexity.after) == (2.0, 1.4)
    assert perplexity.difference.value == pytest.approx(-0.6)
    assert perplexity.verdict == "better"  # though it is lower
    assert [change.verdict for change in found[1].changes] == [""]
    assert found[0].drift.value == 5e-3
    assert findings([*groups, groups[1], groups[1]], score_table(groups)) == []


def test_the_page_shows_all_of_it_and_nothing_where_there_is_none(groups, tmp_path, capsys):
    folders = [str(tmp_path / name) for name in ("base", "tuned", "other")]
    assert main(["compare", *folders, "-o", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "compare.html").read_text()
    checker = Checker()
    checker.feed(text)
    assert (checker.open, checker.fetched) == ([], [])
    for shown in (
        "Behaviour probe",
        "not that a model is safe",
        "Diagnostic by number of steps",
        "What the replies are",
        "Percentiles of the change of log p",
        "2 kJ (0.556 Wh)<small>an estimate</small>",
        "an assumption",
        "procedural: accuracy by number of steps",
        "significantly better",
    ):
        assert shown in text, shown
    # Beside the gain: in the same section.
    assert text.index("Scores, and behaviour") < text.index("Behaviour probe") < text.index("<h2>Pictures")
    assert re.search(r'class="worse">-60\.0 \[', text)
    written = (tmp_path / "out" / "compare.md").read_text()
    assert "| tuned | 40.0% [" in written
    assert "| 2 kJ (0.556 Wh), an estimate |" in written
    assert "\n\n\n" not in written
    assert main(["compare", folders[2], "-o", str(tmp_path / "alone")]) == 0
    alone = (tmp_path / "alone" / "compare.html").read_text()
    for absent in ("Behaviour probe", "by number of steps", "Percentiles", 'class="finding', "Completions"):
        assert absent not in alone, absent
    capsys.readouterr()
