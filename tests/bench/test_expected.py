"""The counts behind docs/gpu.md, and that its table is the generated one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.cases import CASES
from bench.expected import Assumptions, Model, measured_assumptions, measured_ratios, report

ROOT = Path(__file__).parents[2]
HEADLINE = CASES["llama3.1-8b.kl.8192"]
# Where products are all that there is.
NO_BYTES = Assumptions(bandwidth=1e30, efficiency=1.0, loss_epilogue=0.0, scoring_epilogue=0.0)


def test_the_table_in_the_documentation_is_the_generated_one():
    text = (ROOT / "docs" / "gpu.md").read_text()
    begin, end = "<!-- generated: begin -->\n", "<!-- generated: end -->"
    assert text.split(begin)[1].split(end)[0].strip() == report(Assumptions()).strip()


def test_the_assumptions_in_the_documentation_are_those_of_the_code():
    text = (ROOT / "docs" / "gpu.md").read_text()
    given = Assumptions()
    for cell in (
        f"| product rate | {given.product_flops / 1e12:.0f} TFLOP/s |",
        f"| bandwidth | {given.bandwidth / 1e9:.0f} GB/s |",
        f"| efficiency of Triton products | {given.efficiency:.2f} |",
        f"| epilogue of student and teacher | {given.loss_epilogue:.2f} |",
        f"| epilogue of a scoring | {given.scoring_epilogue:.2f} |",
        f"| workspace | {given.workspace >> 20} MiB |",
        f"| rows of a scoring | {given.scoring_rows} |",
    ):
        assert cell in text
    assert "Nothing on this page has been measured on a GPU yet." in text
    assert f"{Model(HEADLINE).least_efficiency(1.15):.2f} there" in text


def test_the_floor_is_the_target_figure():
    assert Model(HEADLINE).floor == pytest.approx(35.5e-3, rel=5e-3)


@pytest.mark.parametrize("operation", ["kl", "kl_trainable", "unisd_star", "scoring"])
def test_without_bytes_the_counts_of_products_remain(operation):
    model = Model(CASES[f"llama3.1-8b.{operation}.8192"], NO_BYTES)
    products = model.case.num_products
    assert model.ratio("fused") == pytest.approx(1.0)
    assert model.ratio("chunked") == pytest.approx(1.0)
    again = 0 if operation == "scoring" else 2
    assert model.ratio("recomputed") == pytest.approx((products + again) / products)


def test_elementwise_bytes_are_added_to_the_products():
    """18 bytes a pair for chunked, 6 for fused, at a rate where they are as long as one product."""
    pairs = HEADLINE.num_rows * HEADLINE.vocab_size
    one_product = Model(HEADLINE, NO_BYTES).floor / 3
    for design, nbytes in (("chunked", 18), ("fused", 6)):
        given = replace(NO_BYTES, bandwidth=nbytes * pairs / one_product, workspace=1 << 60)
        products = Model(HEADLINE, replace(given, bandwidth=1e30)).seconds(design)
        bare = Model(HEADLINE, given)
        # At this bandwidth the products themselves are bound by their FLOPs for fused, by their bytes for chunked.
        own = sum(
            bare.product(HEADLINE.num_rows, result * pairs)
            for result in ((4, 4, 2) if design == "chunked" else (2, 2, 2))
        )
        assert own >= products * 0.999
        assert bare.seconds(design) == pytest.approx(own + one_product)


def test_a_small_scoring_is_bound_by_reading_the_weight_once():
    case = replace(CASES["llama3.1-8b.scoring.256"], num_rows=64)
    model = Model(case)
    weight = 2 * case.hidden_size * case.vocab_size / model.given.bandwidth
    assert model.scoring("fused") == pytest.approx(weight, rel=1e-3)
    # And twice as many groups of rows read it twice.
    assert model.product(64, 0.0) * 2 == pytest.approx(
        Model(replace(case, num_rows=128), replace(model.given, scoring_rows=64)).scoring("fused"), rel=0.1
    )


def test_a_weight_gradient_reads_and_writes_its_sum_for_every_chunk():
    case = CASES["llama3.1-8b.kl_trainable.8192"]
    model = Model(case)
    rows = 16
    moved = 8 * case.vocab_size * case.hidden_size / model.given.bandwidth
    assert model.weight_gradient(rows) == pytest.approx(moved, rel=0.01)
    # More workspace, fewer chunks, less of it.
    more = Model(case, replace(model.given, workspace=4 * model.given.workspace))
    assert more.chunk_rows("fused") > 2 * model.chunk_rows("fused")
    assert more.seconds("fused") < model.seconds("fused")


def test_chunks_fit_the_workspace():
    for name in ("llama3.1-8b.kl.8192", "gemma3-4b.kl.8192", "llama3.1-8b.kl.256"):
        model = Model(CASES[name])
        for design, nbytes in (("fused", 3), ("chunked", 8)):
            held = model.chunk_rows(design) * nbytes * model.case.vocab_size
            assert held <= model.given.workspace
    assert Model(HEADLINE).memory("fused") < 600e6


def test_the_least_efficiency_is_where_the_bar_is_met():
    model = Model(HEADLINE)
    least = model.least_efficiency(1.15)
    at = Model(HEADLINE, replace(model.given, efficiency=least))
    assert at.ratio("fused") == pytest.approx(1.15, abs=1e-6)
    assert Model(CASES["qwen2.5-0.5b.kl.8192"]).least_efficiency(1.15) is None


def test_measured_ceilings_and_ratios_take_the_place_of_assumed_ones(tmp_path):
    file = tmp_path / "ceilings.json"
    file.write_text(json.dumps({"copy_gb_per_s": 2000.0, "product_tflop_per_s": 600.0, "product_order": 8192}))
    given = measured_assumptions(file)
    assert (given.bandwidth, given.product_flops) == (2e12, 6e14)
    rows = [
        {"case": HEADLINE.name, "peer": "unisd fused", "divergence": "forward KL", "ratio_to_floor": 1.234},
        {"case": HEADLINE.name, "peer": "unisd chunked", "divergence": "forward KL", "failure": "out of memory"},
    ]
    text = report(given, measured_ratios({"rows": rows}))
    line = next(line for line in text.splitlines() if line.startswith(f"| {HEADLINE.name} |"))
    assert line.endswith("| 1.23 |  |")
    assert f"| {1e3 * Model(HEADLINE, given).floor:.3g} |" in line
