"""The counts of views in 8 bits behind docs/gpu.md, and that its tables are the generated ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.cases import CASES
from bench.roofline import narrow_views
from bench.roofline.expected import Model
from bench.roofline.narrow_views import (
    CARDS,
    CASE,
    DESIGNS,
    FORMATS,
    MEASURED,
    PRODUCT,
    exact,
    least_rate,
    parts,
    report,
)

ROOT = Path(__file__).parents[2]
H100, _, B300 = CARDS
CHOICE = "above 1e-04, each column's length"
RESULT = json.loads(MEASURED.read_text())


def total(card, code, design):
    return sum(parts(card, code, design, RESULT).values())


def test_the_tables_in_the_documentation_are_the_generated_ones():
    text = (ROOT / "docs" / "gpu.md").read_text()
    begin, end = "<!-- narrow views: begin -->\n", "<!-- narrow views: end -->"
    assert text.split(begin)[1].split(end)[0].strip() == report(RESULT).strip()


def test_the_measured_rows_in_the_documentation_are_those_of_the_result():
    text = (ROOT / "docs" / "gpu.md").read_text()
    int8, e4m3 = FORMATS["int8"], FORMATS["e4m3"]
    formats = {row["format"]: row for row in RESULT["formats"]}
    columns = {(row["format"], row["exact"]): row for row in RESULT["columns"]}
    shown = {
        "int8, above 1e-4": (int8, formats[int8]),
        "e4m3, above 1e-4": (e4m3, formats[e4m3]),
        "e4m3 with 64 directions in place of 16": (e4m3, formats["e4m3, best scale, 64 directions"]),
        "e5m2, above 1e-4": ("e5m2, best scale", formats["e5m2, best scale"]),
        "int8, above 1e-4, each column's length": (int8, columns[int8, CHOICE]),
        "e4m3, above 1e-4, each column's length": (e4m3, columns[e4m3, CHOICE]),
        "e4m3, above 1e-5, each column's length": (e4m3, columns[e4m3, CHOICE.replace("04", "05")]),
    }
    lines = [line.replace("**", "").strip("| ").split(" | ") for line in text.splitlines()]
    for name, (code, row) in shown.items():
        (cells,) = (line[1:] for line in lines if line[0] == name)
        assert cells[0] == f"{formats[code]['rounded_off']:.2%}"
        widths = [row["half_width_median"], row["half_width_max"]]
        assert [float(cell) for cell in cells[1:3]] == [float(f"{width:.2g}") for width in widths]
        assert cells[3:] == [f"{share:.1%}" for share in row["rescored"].values()]
    assert f"to {formats[e4m3]['rounded_off']:.2%}." in text
    saved = {code: exact(H100) - total(H100, code, "union") for code in FORMATS}
    assert f"FP8 saves {1e3 * saved['e4m3']:.0f} of the 97 ms" in text
    assert f"{1e3 * saved['int8']:.0f} of 97 ms by count" in text


def test_exact_views_cost_what_the_other_count_says():
    assert exact(H100) == pytest.approx(3 * Model(CASES["llama3.1-8b.scoring.8192"]).seconds("fused"), rel=0.01)


def test_parts_are_those_of_their_formulas():
    rows, width, columns = 3 * 8192, 4096, 128256
    assert (CASE.num_auxiliary * CASE.num_rows, CASE.hidden_size, CASE.vocab_size) == (rows, width, columns)
    of = {design: parts(H100, "int8", design, RESULT) for design in DESIGNS}
    product = 2.0 * rows * width * columns / (H100.product_flops * 0.92)
    for found in of.values():
        assert found[PRODUCT] == pytest.approx(product / 2)
        assert found["is the head the same?"] == pytest.approx(2 * width * columns / H100.bandwidth)
        assert found["product of the directions"] == pytest.approx(product * 48 / width)
    (listed,) = (row for row in RESULT["columns"] if (row["format"], row["exact"]) == ("int8", CHOICE))
    assert of["lists"]["exact columns"] == pytest.approx(rows * listed["a_row_mean"] * 8192 / H100.bandwidth)
    assert of["lists"]["scored again"] == pytest.approx(listed["rescored"]["0.05"] * exact(H100))
    assert of["frequent"]["exact columns"] == pytest.approx(exact(H100) / 12, rel=1e-3)
    assert of["none"]["exact columns"] == 0.0
    faster = parts(replace(H100, bandwidth=1e30), "int8", "union", RESULT)
    assert faster["exact columns"] == pytest.approx(product * listed["a_block_mean"] / columns)
    slower = parts(replace(H100, product_flops=1e30), "int8", "union", RESULT)
    blocks = rows / RESULT["block_rows"]
    assert slower["exact columns"] == pytest.approx(blocks * listed["a_block_mean"] * 8192 / H100.bandwidth)


def test_what_a_card_lacks_costs():
    short, long = (parts(replace(H100, short_sums=short), "e4m3", "lists", RESULT) for short in (True, False))
    assert short["its epilogue"] - long["its epilogue"] == pytest.approx(32 * 3 * 8192 * 128256 / H100.lanes)
    assert parts(H100, "int8", "lists", RESULT)["its epilogue"] < short["its epilogue"]
    assert total(B300, "int8", "lists") > exact(B300)


def test_at_the_least_rate_nothing_is_saved():
    for code in FORMATS:
        rate = least_rate(H100, code, parts(H100, code, "union", RESULT))
        assert total(replace(H100, int8=rate, fp8=rate), code, "union") == pytest.approx(exact(H100))
    assert least_rate(H100, "e4m3", parts(H100, "e4m3", "none", RESULT)) is None


def test_the_command_prints_the_report(capsys):
    assert narrow_views.main([]) == 0
    assert capsys.readouterr().out.strip() == report(RESULT).strip()
    assert all(name in report(RESULT) for name in (*DESIGNS, *FORMATS))
