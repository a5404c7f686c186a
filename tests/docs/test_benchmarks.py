"""docs/benchmarks.md, docs/study.md, their plots and the tables of README.md are what the result files say."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from matplotlib import image

from bench.report import machine_page, pages, plots

ROOT = pages.ROOT


def test_pages_are_those_of_the_result_files():
    for path, text in pages.pages().items():
        assert (ROOT / path).read_text() == text, f"{path}: run python -m bench report"


def test_a_figure_that_differs_is_noticed(tmp_path, monkeypatch, capsys):
    """By one digit of one ratio, in the page and in README.md."""
    results = tmp_path / "results"
    shutil.copytree(pages.RESULTS, results)
    # Of every machine: the picture shows the one measured last.
    for file in [path for folder in machine_page.folders(results) if (path := folder / "float32.json").exists()]:
        result = json.loads(file.read_text())
        (row,) = (
            row
            for row in result["rows"]
            if (row["case"], row["divergence"], row["peer"]) == ("unisd_star_cpu", "forward KL", "unisd_kernels")
        )
        row["ratio_to_floor"] += 0.01
        file.write_text(json.dumps(result))
    monkeypatch.setattr(pages, "RESULTS", results)
    assert pages.main(["--check"]) == 1
    said = capsys.readouterr().out
    assert "docs/benchmarks.md is not what the results say" in said
    assert "README.md is not what the results say" in said
    assert "docs/figures/peers.svg is not what the results say" in said


def test_one_item_that_differs_is_noticed(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    shutil.copytree(pages.RESULTS, results)
    file = results / "study_study_cpu.json"
    result = json.loads(file.read_text())
    (run,) = (run for run in result["runs"] if run["name"] == "procedural-sft-1")
    digits = run["evaluations"]["procedural"]["digits"]
    digits["accuracy"] = f"{1 - int(digits['accuracy'][0])}{digits['accuracy'][1:]}"
    file.write_text(json.dumps(result))
    monkeypatch.setattr(pages, "RESULTS", results)
    assert pages.main(["--check"]) == 1
    said = capsys.readouterr().out
    assert "docs/study.md is not what the results say" in said
    assert "docs/figures/study_gain_against_drift.svg is not what the results say" in said


def test_the_page_is_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs" / "figures").mkdir(parents=True)
    (tmp_path / "README.md").write_text("before\n<!-- figures: demo -->\nold\n<!-- end of figures -->\nafter\n")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    assert pages.main([]) == 0
    assert "## Scaling" in (tmp_path / "docs" / "benchmarks.md").read_text()
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n<!-- figures: demo -->\n\n| seed |")
    assert readme.endswith("<!-- end of figures -->\nafter\n")
    assert "old" not in readme
    assert pages.main(["--check"]) == 0
    assert capsys.readouterr().out.count("written") == 5


# One machine; those of all take seconds more.
MACHINES = [
    pytest.param(folder, id=folder.name, marks=[pytest.mark.exhaustive] if place else [])
    for place, folder in enumerate(machine_page.folders(pages.RESULTS))
]


@pytest.mark.parametrize("folder", MACHINES)
def test_plots_are_those_of_the_result_files(folder, tmp_path):
    drawn, kept_in = machine_page.plots_of(folder), ROOT / pages.FIGURES / folder.name
    # A machine of which no part with a plot was measured has no folder of them.
    assert set(drawn) == ({path.name for path in kept_in.iterdir()} if kept_in.exists() else set())
    for name, figure in drawn.items():
        plots.save(figure, tmp_path / name)
        now, kept = (image.imread(path / name) for path in (tmp_path, ROOT / pages.FIGURES / folder.name))
        assert now.shape == kept.shape
        # Not to the bit: another version of the library or a font may smooth an edge otherwise.
        assert np.abs(now - kept).mean() < 2e-3, "run python -m bench report --plots (make figures)"
