"""Several seeds as one row: which runs are a group, and its mean, range and interval."""

import pytest

from tests.compare.evaluated import write_all
from tests.compare.test_compare import write_run
from unisd.cli import main
from unisd.compare import load_run
from unisd.compare.groups import group_runs
from unisd.compare.tables import mean_gain, score_table


def reseed(folder, seed, preset="plain", **more):
    lines = [f"preset: {preset}", f"seed: {seed}", f"output_dir: {folder}", *(f"{k}: {v}" for k, v in more.items())]
    (folder / "unisd_config.yaml").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def folders(tmp_path):
    runs = [write_run(tmp_path / "base", range(5), trained=False)]
    for seed, right in ((0, range(10)), (1, range(5, 19))):
        runs.append(reseed(write_run(tmp_path / f"a-plain-{seed}", right, lr=0.01 * (seed + 1)), seed))
    runs.append(reseed(write_run(tmp_path / "a-sft-0", range(5)), 0, "sft"))
    return runs


def test_runs_that_differ_only_by_the_seed_are_a_group(folders):
    groups = group_runs([load_run(folder) for folder in folders])
    assert [(group.name, group.seeds) for group in groups] == [
        ("base", ""),
        ("a-plain", "seeds 0, 1"),
        ("a-sft-0", ""),
    ]
    assert [group.name for group in group_runs([load_run(folder) for folder in folders], "none")] == [
        "base",
        "a-plain-0",
        "a-plain-1",
        "a-sft-0",
    ]


def test_other_settings_are_not_and_the_same_seed_twice_is_not(folders):
    reseed(folders[2], 1, learning_rate=3)
    runs = [load_run(folder) for folder in folders]
    assert len(group_runs(runs)) == 4
    assert [(g.name, len(g.runs)) for g in group_runs(runs, "preset")] == [("base", 1), ("plain", 2), ("a-sft-0", 1)]
    reseed(folders[2], 0)
    assert len(group_runs([load_run(folder) for folder in folders])) == 4
    with pytest.raises(ValueError, match="how must be one of seed, preset, none"):
        group_runs(runs, "color")


def test_mean_and_range_over_seeds_and_an_interval_over_items(folders):
    groups = group_runs([load_run(folder) for folder in folders])
    table = score_table(groups)
    base, plain, _ = table["cos_e"]
    assert (plain.value, plain.over_runs.low, plain.over_runs.high) == (pytest.approx(0.6), 0.5, 0.7)
    assert plain.low < 0.6 < plain.high
    assert plain.difference.value == pytest.approx(0.6 - 0.25)
    # Items count with their mean: fewer than 20 of either single run could tell.
    assert plain.difference.low > 0
    assert base.over_runs is None
    gain = mean_gain(table, groups)[1]
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.35, 0.25, 0.45))


def test_seeds_on_other_items_have_a_mean_and_no_interval(folders):
    file = folders[2] / "eval" / "cos_e.jsonl"
    file.write_text(file.read_text().replace("question 3?", "question 30?"))
    plain = score_table(group_runs([load_run(folder) for folder in folders]))["cos_e"][1]
    assert (plain.value, plain.low, plain.difference) == (pytest.approx(0.6), None, None)


def test_the_page_has_one_row_and_one_point_with_bars(folders, tmp_path, capsys):
    for shift, folder in enumerate(folders[1:3]):
        write_all(folder, shift=1 + shift)
    assert main(["compare", *map(str, folders), "-o", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "compare.html").read_text()
    assert "seeds: 50.0% to 70.0%" in text
    assert text.count('class="bar run1"') == 2  # drift across, gain up
    assert text.count('class="line run1"') >= 4  # a curve of loss and of drift for each seed
    assert "seeds 50.0% to 70.0%" in (tmp_path / "out" / "compare.md").read_text()
    assert main(["compare", *map(str, folders), "-o", str(tmp_path / "out"), "--group", "none"]) == 0
    assert 'class="bar' not in (tmp_path / "out" / "compare.html").read_text()
    capsys.readouterr()
