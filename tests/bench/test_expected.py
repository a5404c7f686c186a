"""The counts behind docs/gpu.md, that they are of what is built, and that its table is the generated one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from bench.cases import ACCELERATOR_CASES, CASES, HEADS
from bench.roofline.expected import (
    GRADIENT_PARTIALS,
    Assumptions,
    Model,
    _spans,
    measured_assumptions,
    measured_ratios,
    report,
)
from unisd_kernels.backends import engine
from unisd_kernels.backends.base import NeedsGrad
from unisd_kernels.backends.projection import Projection
from unisd_kernels.backends.triton import configs
from unisd_kernels.backends.triton.chunked_divergence import ChunkedDivergence
from unisd_kernels.backends.triton.fused_divergence import FusedDivergence
from unisd_kernels.heads import LMHead

ROOT = Path(__file__).parents[2]
HEADLINE = CASES["llama3.1-8b.kl.8192"]
TRAINABLE = CASES["llama3.1-8b.kl_trainable.8192"]
# Where products are all that there is.
NO_BYTES = Assumptions(bandwidth=1e30, efficiency=1.0, loss_epilogue=0.0, scoring_epilogue=0.0)
META = torch.device("meta")


class Moved(TorchDispatchMode):
    """Bytes that elementwise operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mul, torch.ops.aten.mul_, torch.ops.aten._to_copy):
            self.nbytes += sum(part.nbytes for part in (*args, result) if isinstance(part, torch.Tensor) and part.dim())
        return result


def moved_by(step: Callable[[], object]) -> int:
    with Moved() as counted:
        step()
    return counted.nbytes


def test_the_table_in_the_documentation_is_the_generated_one():
    text = (ROOT / "docs" / "gpu.md").read_text()
    begin, end = "<!-- generated: begin -->\n", "<!-- generated: end -->"
    assert text.split(begin)[1].split(end)[0].strip() == report(Assumptions()).strip()


def test_the_assumptions_in_the_documentation_are_those_of_the_code():
    text = (ROOT / "docs" / "gpu.md").read_text()
    given = Assumptions()
    held = [Model(case).workspace >> 20 for case in (HEADLINE, TRAINABLE)]
    for cell in (
        f"| product rate | {given.product_flops / 1e12:.0f} TFLOP/s |",
        f"| bandwidth | {given.bandwidth / 1e9:.0f} GB/s |",
        f"| efficiency of Triton products | {given.efficiency:.2f} |",
        f"| epilogue of student and teacher | {given.loss_epilogue:.2f} |",
        f"| epilogue of a scoring | {given.scoring_epilogue:.2f} |",
        f"| workspace | {held[0]} MiB; {held[1]} MiB with a trainable head |",
        f"| rows of a scoring | {given.scoring_rows} |",
    ):
        assert cell in text


def test_what_the_documentation_concludes():
    text = " ".join((ROOT / "docs" / "gpu.md").read_text().split())
    for case in ACCELERATOR_CASES:
        behind = Model(case).ratio("fused") - Model(case).ratio("chunked")
        if case.operation != "scoring" and case.frozen_head:
            assert behind < 0
    assert 0.005 < Model(TRAINABLE).ratio("chunked") - Model(TRAINABLE).ratio("fused") < 0.015
    assert f"fused needs an efficiency of {Model(HEADLINE).least_efficiency(1.15):.2f} for 1.15" in text
    hidden = Model(HEADLINE, Assumptions(loss_epilogue=Assumptions().loss_epilogue / 2))
    assert f"it would be {hidden.ratio('fused'):.2f}, and meet the bar from an efficiency of" in text
    assert f"efficiency of {hidden.least_efficiency(1.15):.2f}." in text
    assert f"({Model(HEADLINE).ratio('fused'):.2f} to {Model(HEADLINE).ratio('chunked'):.2f} at the headline)" in text
    trainable = Model(TRAINABLE).least_efficiency(1.15)
    assert f"The trainable head at N = 8192 needs {trainable:.2f}" in text
    least = {name: Model(CASES[f"llama3.1-8b.{name}"]).least_efficiency for name in ("unisd_star.8192", "scoring.8192")}
    assert f"needs {least['unisd_star.8192'](1.15):.2f}, a scoring {least['scoring.8192'](1.1):.2f}." in text
    end = Model(TRAINABLE).weight_gradient_end / Model(TRAINABLE).floor
    assert f"after its last chunk is {end:.3f} of the floor" in text
    assert f"6 bytes a weight, {Model(TRAINABLE).memory('fused') / 1e9:.1f} GB" in text


def test_the_floor_is_the_target_figure():
    assert Model(HEADLINE).floor == pytest.approx(35.5e-3, rel=5e-3)


@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("operation", ["kl", "kl_trainable"])
@pytest.mark.parametrize(("design", "walk"), [("fused", FusedDivergence), ("chunked", ChunkedDivergence)])
def test_rows_are_those_of_the_walks(shape, operation, design, walk, monkeypatch):
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    case = CASES[f"{shape}.{operation}.8192"]
    hidden, weight = (
        torch.empty(rows, case.hidden_size, dtype=case.dtype, device=META) for rows in (case.num_rows, case.vocab_size)
    )
    projection = Projection.of(hidden, LMHead(weight), 0.7)
    workspace = engine.default_workspace_bytes(torch.device("cuda"), not case.frozen_head)
    built = walk(projection, projection, 0.0, workspace, NeedsGrad(True, not case.frozen_head))
    split = Model(case).rows(design)
    assert (split.chunk, split.block) == (built.chunk_rows, built.block_rows)
    held = sum(
        buffer.untyped_storage().nbytes()
        for buffer in vars(built).values()
        if isinstance(buffer, torch.Tensor) and buffer.dim() == 2
    )
    # Beside the buffers there are the partial statistics of a block: ten numbers a block of columns.
    columns = {"fused": 128, "chunked": 1024}[design]
    assert split.held_bytes - held == split.block * 4 * 10 * -(-case.vocab_size // columns)
    assert split.held_bytes <= workspace


def test_a_library_product_of_another_temperature_costs_no_pass(monkeypatch):
    """Why the chunked design has no bytes for it."""
    monkeypatch.setattr(Projection, "_mixed_product", property(lambda self: True))  # as on a GPU
    hidden, weight = (torch.empty(rows, 16, dtype=torch.bfloat16, device=META) for rows in (8, 64))
    out = torch.empty(8, 64, device=META)
    projection = Projection.of(hidden, LMHead(weight), 0.7)
    assert projection.transform.product_scale != 1.0
    assert moved_by(lambda: projection.logits(slice(0, 8), out)) == 0


def test_a_trainable_head_is_handed_over_as_counted():
    sums = engine.Gradients(None, torch.empty(64, 16, device=META), None)
    upstream = torch.empty((), device=META)
    handed = moved_by(lambda: sums.scaled(upstream, torch.bfloat16, torch.bfloat16))
    weights = TRAINABLE.vocab_size * TRAINABLE.hidden_size
    model = Model(TRAINABLE)
    assert model.weight_gradient_end * model.given.bandwidth == pytest.approx(handed / (64 * 16) * weights)


@pytest.mark.parametrize("operation", ["kl", "kl_trainable", "unisd_star", "scoring"])
def test_without_bytes_the_counts_of_products_remain(operation):
    model = Model(CASES[f"llama3.1-8b.{operation}.8192"], NO_BYTES)
    products = model.case.num_products
    assert model.ratio("fused") == pytest.approx(1.0)
    assert model.ratio("chunked") == pytest.approx(1.0)
    again = 0 if operation == "scoring" else 2
    assert model.ratio("recomputed") == pytest.approx((products + again) / products)


def test_bytes_a_pair_outside_the_products():
    """Eight partial statistics of four bytes every 128 columns (every 1024 for chunked), written and read; ten with an
    entropy. Fused writes them inside its product, and reads eight of them again for the gradient."""
    headline, with_entropy = Model(HEADLINE), Model(CASES["llama3.1-8b.unisd_star.8192"])
    assert headline.exposed_bytes("fused") == 4 + 2 + 4 * (8 + GRADIENT_PARTIALS) / 128
    assert with_entropy.exposed_bytes("fused") == 4 + 2 + 4 * (10 + GRADIENT_PARTIALS) / 128
    assert headline.exposed_bytes("chunked") == 8 + 8 + 2 + 4 * 2 * 8 / 1024
    assert headline.exposed_bytes("chunked", jsd=True) == headline.exposed_bytes("chunked") + 8
    # The fused one's sums are one more pass over what it stored, with the references of the blocks.
    more = headline.exposed_bytes("fused", jsd=True) - headline.exposed_bytes("fused")
    assert more == 2 + 2 + 4 * GRADIENT_PARTIALS / 128
    with pytest.raises(ValueError, match="not counted"):
        headline.seconds("recomputed", jsd=True)


@pytest.mark.parametrize("design", ["fused", "chunked"])
def test_elementwise_bytes_are_added_to_the_products(design):
    """At a rate where they are as long as one product, and the products read and write for longer than they compute."""
    pairs = HEADLINE.num_rows * HEADLINE.vocab_size
    one_product = Model(HEADLINE, NO_BYTES).floor / 3
    exposed = Model(HEADLINE).exposed_bytes(design) * pairs
    given = replace(NO_BYTES, bandwidth=exposed / one_product)
    model = Model(HEADLINE, given)
    split = model.rows(design)
    expected = one_product
    for rows in _spans(HEADLINE.num_rows, split.chunk):
        expected += sum(model.forward(design, block) for block in _spans(rows, split.block))
        expected += model.product(rows, 2 * rows * HEADLINE.vocab_size)
    assert model.seconds(design) == pytest.approx(expected)
    assert expected > 3.9 * one_product


def test_the_weight_is_read_once_a_block_by_the_fused_product_and_twice_by_the_library():
    """Where only the weight's bytes matter."""
    model = Model(HEADLINE, replace(NO_BYTES, product_flops=1e30, bandwidth=1.0))
    weight = 2 * HEADLINE.hidden_size * HEADLINE.vocab_size
    assert model.forward("fused", 1) == pytest.approx(weight, rel=1e-2)
    assert model.forward("chunked", 1) == pytest.approx(2 * weight, rel=1e-2)
    assert model.forward("recomputed", 1) == pytest.approx(2 * weight, rel=1e-2)
    # And each further row adds its logits only.
    further = model.forward("fused", 2) - model.forward("fused", 1)
    assert further == pytest.approx((4 + 4 * 8 / 64) * HEADLINE.vocab_size, rel=0.05)


def test_a_small_scoring_is_bound_by_reading_the_weight_once():
    case = replace(CASES["llama3.1-8b.scoring.256"], num_rows=64)
    model = Model(case)
    weight = 2 * case.hidden_size * case.vocab_size / model.given.bandwidth
    assert model.scoring == pytest.approx(weight, rel=1e-3)
    # And twice as many groups of rows read it twice.
    assert model.product(64, 0.0) * 2 == pytest.approx(
        Model(replace(case, num_rows=128), replace(model.given, scoring_rows=64)).scoring, rel=0.1
    )


def test_a_weight_gradient_reads_and_writes_its_sum_for_every_chunk():
    model = Model(TRAINABLE)
    rows = 16
    moved = 8 * TRAINABLE.vocab_size * TRAINABLE.hidden_size / model.given.bandwidth
    assert model.weight_gradient(rows) == pytest.approx(moved, rel=0.01)
    assert model.weight_gradient(rows, first=True) == pytest.approx(moved / 2, rel=0.01)
    # Less workspace, more chunks, more of it.
    less = Model(TRAINABLE, replace(model.given, workspace=model.workspace // 4))
    assert less.rows("fused").chunk < model.rows("fused").chunk / 2
    assert less.seconds("fused") > model.seconds("fused")


def test_memory_at_the_peak():
    """A frozen head: the workspace and the float32 gradient of the rows. A trainable one: the float32 sum with the
    result, or with the workspace."""
    rows, weights = (n * HEADLINE.hidden_size for n in (HEADLINE.num_rows, HEADLINE.vocab_size))
    assert Model(HEADLINE).memory("fused") == Model(HEADLINE).rows("fused").held_bytes + 4 * rows
    assert Model(HEADLINE).memory("fused") < 600e6
    assert Model(TRAINABLE).memory("fused") == 6 * (weights + rows)
    small = Model(CASES["qwen2.5-0.5b.kl_trainable.8192"])
    held = 4 * 896 * (8192 + 151936)
    assert small.memory("fused") == small.rows("fused").held_bytes + held > 6 / 4 * held


def test_the_least_efficiency_is_where_the_bar_is_met():
    case = CASES["llama3.1-8b.unisd_star.8192"]
    model = Model(case)
    least = model.least_efficiency(1.15)
    assert least is not None
    at = Model(case, replace(model.given, efficiency=least))
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
