"""Measuring tiles: what is listed is what the operations ask for, one failure costs one row, nothing is left behind."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench.measuring.deadline import NO_DEADLINE, Deadline
from bench.records.failures import OUT_OF_TIME
from bench.roofline import tuning, tuning_candidates
from bench.roofline.tuning_shapes import SHAPES, Shape, library_products, operation
from unisd.cli.errors import CommandError
from unisd_kernels.backends import engine
from unisd_kernels.backends.triton import backend, fused_divergence, score
from unisd_kernels.backends.triton import configs as package
from unisd_kernels.backends.triton.launch import interpreting

ROOT = Path(__file__).parents[2]
CPU, META = torch.device("cpu"), torch.device("meta")


def small(kind: str) -> Shape:
    return Shape(kind, "small", rows=8, width=16, columns=40, dtype=torch.float16)


def run(tmp_path, timer, shapes, deadline=NO_DEADLINE, library=lambda shape, device: 1.0):
    output = tmp_path / "tuning.json"
    status = tuning.run(shapes, CPU, deadline, output, timer, library)
    return status, json.loads(output.read_text())


@pytest.fixture
def two_candidates(monkeypatch):
    """For the interpreter's table, which has one of each kind."""
    first, *_ = package.TABLE["interpreter"]["fused-divergence"]
    second = replace(first, rows=32)
    monkeypatch.setitem(package.TABLE["interpreter"], "fused-divergence", (first, second))
    return first, second


def test_shapes_are_those_of_the_walks():
    assert {shape.kind for shape in SHAPES} == {"fused-divergence", "score", "score-few"}
    assert all(shape.rows == engine.SCORE_ROWS for shape in SHAPES if shape.kind == "score")
    assert [(shape.name, shape.rows) for shape in SHAPES if shape.kind == "fused-divergence"][:2] == [
        ("llama3.1-8b", 512),
        ("llama3.1-8b", 1024),
    ]
    assert SHAPES[0].flops == 2 * 2 * 512 * 4096 * 128256


@pytest.mark.skipif(not interpreting(), reason="tiny shapes are for the interpreter")
@pytest.mark.parametrize("kind", ["fused-divergence", "score-few"])
def test_an_operation_asks_for_its_kind_and_shape(kind, monkeypatch):
    asked = []
    choose = package.choose

    def spy(kind, device, shape, launch):
        asked.append((kind, tuple(shape)))
        return choose(kind, device, shape, launch)

    for module in (score, fused_divergence):
        monkeypatch.setattr(module, "choose", spy)
    shape = small(kind)
    operation(shape, CPU)()
    assert asked == [(kind, (8, 40, 16))]
    library_products(shape, CPU)()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.kind}-{shape.name}-{shape.rows}")
def test_listed_shapes_are_of_the_kind_they_say(shape, monkeypatch):
    """Up to the launch, without memory for it."""
    asked = []

    class Stop(Exception):
        pass

    def stop(kind, device, sizes, launch):
        asked.append((kind, tuple(sizes)))
        raise Stop

    for module in (score, fused_divergence):
        monkeypatch.setattr(module, "choose", stop)
    # What is not a tensor of the meta device's: the kernel of the rows' differences and the random numbers.
    monkeypatch.setattr(
        "bench.roofline.tuning_shapes._operands",
        lambda shape, device: tuple(
            torch.empty(rows, shape.width, dtype=shape.dtype, device=META)
            for rows in (shape.rows, shape.rows, shape.columns)
        ),
    )
    monkeypatch.setattr(fused_divergence, "teacher_rows", lambda student, teacher: (teacher, None))
    monkeypatch.setattr(backend, "interpreting", lambda: False)  # nothing is launched here, whatever the dtype
    with pytest.raises(Stop):
        operation(shape, META)()
    assert asked == [(shape.kind, (shape.rows, shape.columns, shape.width))]


def test_a_failing_candidate_is_a_row_and_the_others_are_timed(tmp_path, two_candidates, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "operation", lambda shape, device: lambda: None)
    _, second = two_candidates

    def timer(kind, config, device, operate):
        if config == second:
            raise RuntimeError("out of resource: shared memory")
        return 2.0

    shape = small("fused-divergence")
    status, result = run(tmp_path, timer, [shape])
    assert status == 0
    rows = result["shapes"][0]["candidates"]
    assert [(row["default"], row["won"]) for row in rows] == [(True, True), (False, False)]
    assert rows[0]["tflop_per_s"] == pytest.approx(2 * 2 * 8 * 16 * 40 / 2e-3 / 1e12)
    printed = capsys.readouterr().out
    assert "| RuntimeError: out of resource: shared memory |" in printed
    assert "| 0.50 | default, won |" in printed
    assert "library, 2 products" in printed


def test_a_failing_default_fails_the_run(tmp_path, two_candidates, monkeypatch):
    monkeypatch.setattr(tuning, "operation", lambda shape, device: lambda: None)
    first, _ = two_candidates

    def timer(kind, config, device, operate):
        if config == first:
            raise RuntimeError("no")
        return 1.0

    status, result = run(tmp_path, timer, [small("fused-divergence")])
    assert status == 1
    assert [row["won"] for row in result["shapes"][0]["candidates"]] == [False, True]


def test_a_deadline_and_an_operation_that_cannot_be_made(tmp_path, monkeypatch, capsys):
    shape = small("fused-divergence")
    status, result = run(tmp_path, lambda *arguments: 1.0, [shape], Deadline(-1))
    assert status == 0
    assert [(row["failure"], row["won"]) for row in result["shapes"][0]["candidates"]] == [(OUT_OF_TIME, False)]
    assert "library_milliseconds" not in result["shapes"][0]

    def refuse(shape, device):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(tuning, "operation", refuse)
    status, _ = run(tmp_path, lambda *arguments: 1.0, [shape])
    assert status == 1
    assert "| out of memory |" in capsys.readouterr().out


def test_one_candidate_is_measured_and_nothing_is_left_behind(monkeypatch, tmp_path):
    """Where the device has candidates: sm_80's are those of an unknown one."""
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path))
    monkeypatch.delenv("UNISD_TRITON_AUTOTUNE", raising=False)
    durations = {config: float(i + 1) for i, config in enumerate(package.candidates("fused-divergence", META))}
    monkeypatch.setattr(package, "_median_milliseconds", lambda launch, option: launch(option) or durations[option])
    launched: list[package.GemmConfig] = []

    def operate():
        package.choose("fused-divergence", META, (8, 40, 16), launched.append)

    table = dict(package._AMPERE)
    for config, duration in (*durations.items(), *durations.items()):
        assert tuning_candidates.milliseconds("fused-divergence", config, META, operate) == duration
        assert set(launched) == {config}
        launched.clear()
    with pytest.raises(RuntimeError, match="asked for fused-divergence, not for score"):
        tuning_candidates.milliseconds("score", package.candidates("score", META)[1], META, operate)
    assert table == package._AMPERE
    assert package.measured == package._winners == {}
    assert list(tmp_path.iterdir()) == []
    assert os.environ["UNISD_CACHE"] == str(tmp_path)
    assert "UNISD_TRITON_AUTOTUNE" not in os.environ


@pytest.mark.parametrize("device", ["cpu", *(() if torch.cuda.is_available() else ("cuda",))])
def test_it_refuses_where_there_is_no_gpu(device, tmp_path):
    with pytest.raises(CommandError, match="--dry-run lists what would be measured"):
        tuning.main(["--device", device, "--output", str(tmp_path / "tuning.json")])
    assert not list(tmp_path.iterdir())


def test_the_listing_names_every_candidate():
    text = tuning.listing()
    for shape in SHAPES:
        assert f"{shape.kind}, {shape.name}: {shape.rows} x {shape.width} x {shape.columns}" in text
        for config in package.TABLE["sm_90"][shape.kind]:
            assert tuning.describe(config) in text
    config = package.GemmConfig(64, 128, 32, 4, 3, parts=2, occupancy=2, descriptors=True, flatten=True)
    assert tuning.describe(config) == "64x128x32, 4 warps, 3 stages, parts 2, occupancy 2, descriptors, flatten"
