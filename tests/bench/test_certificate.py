"""The study of int8 scores: each of its bounds holds, and the last one is worth more than the first."""

from __future__ import annotations

from bench.studies import certificate
from tests.certified.problems import sampled_problem


def test_every_bound_holds_and_the_table_tells_them():
    head, views = sampled_problem(30, 48, 800)
    rows = certificate.measure(head, [views])
    assert [row["bound"] for row in rows] == list(certificate.BOUNDS)
    assert all(row["largest_outside"] <= 1e-4 for row in rows)
    assert rows[-1]["half_width_median"] < 0.1 * rows[0]["half_width_median"]
    for tolerance in ("0.01", "0.1"):
        assert rows[-1]["rescored"][tolerance] < rows[0]["rescored"][tolerance] == 1.0
    seconds = {"float32 product": [2.0, 2.0], "int8 product": [0.5, 0.6]}
    page = certificate.table({"model": "m", "files": ["rows.jsonl"], "rows": rows, "seconds": seconds})
    assert "| int8 product | 0.30 |" in page
    assert f"| length of the error | {rows[-1]['largest_error']:.2g} |" in page
