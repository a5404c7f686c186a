"""The plots: what they draw is what the rows say."""

from __future__ import annotations

import json

import pytest

from bench.cases import CASES
from bench.peers import FLOOR, OURS, PEERS
from bench.records.results_file import case_fields
from bench.report import plots
from bench.report.tables import tflop_per_s
from bench.studies import scaling
from unisd.cli.errors import CommandError

PEER_NAMES = scaling.COMPARED
CEILINGS = {"device": "cpu", "copy_gb_per_s": 10.0, "product_tflop_per_s": 0.2, "product_order": 2048}


def row_of(case, peer):
    seconds = (1 + PEER_NAMES.index(peer)) * case.flops / 1e11
    row = {**case_fields(case), "peer": peer, "divergence": "forward KL", "note": "", "median_seconds": seconds}
    return row if peer == FLOOR else {**row, "extra_peak_bytes": 1e6 * seconds + 1e5}


def scaling_result(device="cpu"):
    cases = scaling.CPU_PLAN.sweeps("unisd_star")
    distinct = {case.name: case for of_axis in cases.values() for case in of_axis}
    rows = [row_of(case, peer) for case in distinct.values() for peer in PEER_NAMES]
    rows[-1] = {**rows[-1], "failure": "out of memory"}  # TRL at K = 7
    return scaling.result_of(rows, cases, scaling.CPU_PLAN.case("unisd_star"), {"device": device})


def ordinary_result():
    cases = [CASES[name] for name in ("unisd_star_cpu", "kl_cpu", "scoring_cpu")]
    rows = [row_of(case, peer) for case in cases for peer in PEER_NAMES]
    rows[-1] = {**rows[-1], "failure": "out of memory"}
    return {"environment": {"device": "cpu"}, "rows": rows, "left_out": []}


def lines_of(axes):
    return {line.get_label(): line for line in axes.get_lines()}


@pytest.mark.parametrize("device", ["cpu", "an accelerator"])
def test_time_panels_are_the_rows(device):
    result = scaling_result(device)
    panels = plots.scaling_time(result).axes
    assert len(panels) == 4
    for axes, sweep in zip(panels, result["sweeps"], strict=True):
        axis = sweep["axis"]
        own = [row for row in result["rows"] if row["case"] in sweep["cases"]]
        floor = [row for row in own if row["peer"] == FLOOR]
        unit = max(floor, key=lambda row: row[scaling.AXES[axis]])["median_seconds"] if device == "cpu" else 1e-3
        for peer in PEER_NAMES:
            rows = [row for row in own if row["peer"] == peer and "failure" not in row]
            line = lines_of(axes)[peer]
            drawn = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
            assert drawn == {row[scaling.AXES[axis]]: row["median_seconds"] / unit for row in rows}
        assert len(lines_of(axes)["trl composed"].get_xdata()) == len(scaling.CPU_PLAN.axes[axis]) - (axis == "K")
        scale = "linear" if axis == "K" else "log"
        assert (axes.get_xscale(), axes.get_yscale()) == (scale, scale)
        label = f"time / floor's time at {axis} = {max(scaling.CPU_PLAN.axes[axis])}" if device == "cpu" else "time, ms"
        assert axes.get_ylabel() == label
        assert [tick.get_text() for tick in axes.get_xticklabels()] == [str(x) for x in scaling.CPU_PLAN.axes[axis]]


def test_memory_panels_are_the_rows():
    result = scaling_result()
    for axes, sweep in zip(plots.scaling_memory(result).axes, result["sweeps"], strict=True):
        lines = lines_of(axes)
        assert set(lines) == set(PEER_NAMES) - {FLOOR}
        points, _ = scaling.sweep_points(result["rows"], sweep, OURS, "memory")
        assert list(lines[OURS].get_xdata()) == [x for x, _ in points]
        assert list(lines[OURS].get_ydata()) == [y / 1e6 for _, y in points]
        assert axes.get_ylabel() == "extra peak memory, MB"


def test_without_a_floor_cpu_times_are_not_drawn():
    result = scaling_result()
    result["rows"] = [row for row in result["rows"] if row["peer"] != FLOOR]
    for axes in plots.scaling_time(result).axes:
        assert not axes.get_lines()
        assert "no floor" in axes.get_ylabel()


def test_an_operation_without_views_has_three_panels():
    result = scaling_result()
    result["sweeps"] = [sweep for sweep in result["sweeps"] if sweep["axis"] != "K"]
    assert len(plots.scaling_time(result).axes) == 3


def test_roofline_points_are_the_rows():
    rows = ordinary_result()["rows"]
    (axes,) = plots.roofline(rows, CEILINGS).axes
    lines = lines_of(axes)
    for peer in PEER_NAMES:
        own = [row for row in rows if row["peer"] == peer and "failure" not in row]
        assert list(lines[peer].get_xdata()) == [plots.intensity(row) for row in own]
        assert list(lines[peer].get_ydata()) == [tflop_per_s(row) for row in own]
    assert len(lines["trl composed"].get_xdata()) == 2
    slope, flat = lines["copy, 10 GB/s"], lines["product, 0.2 TFLOP/s"]
    assert list(flat.get_ydata()) == [0.2, 0.2]
    # 10 GB/s feed 0.2 TFLOP/s from 20 FLOP a byte on.
    assert flat.get_xdata()[0] == pytest.approx(20)
    assert [y / x for x, y in zip(slope.get_xdata(), slope.get_ydata(), strict=True)] == pytest.approx([0.01, 0.01])


def test_intensity_counts_head_and_hidden_states_once():
    for case in CASES.values():
        assert plots.intensity(row_of(case, FLOOR)) == case.flops / case.bytes_read
    # UniSD* at K = 3: 7 products of 2 N H V FLOPs; of four bytes each, V H weights and 6 views of N H numbers.
    loss = plots.intensity(row_of(scaling.CPU_PLAN.case("unisd_star"), FLOOR))
    assert loss == pytest.approx(2 * 7 * 256 * 32768 / (4 * (32768 + 6 * 256)))


def test_without_ceilings_the_floor_is_the_roof():
    (axes,) = plots.roofline(ordinary_result()["rows"]).axes
    (roof,) = [line for label, line in lines_of(axes).items() if label.startswith("floor's best")]
    assert roof.get_ydata() == pytest.approx([0.1, 0.1])


def test_a_peer_looks_the_same_in_every_plot():
    drawn = plots.figures([scaling_result(), ordinary_result()], CEILINGS)
    for peer in PEER_NAMES:
        looks = {
            (lines_of(axes)[peer].get_color(), lines_of(axes)[peer].get_marker())
            for figure in drawn.values()
            for axes in figure.axes
            if peer in lines_of(axes)
        }
        assert looks == {(plots.style(peer)["color"], plots.style(peer)["marker"])}


def test_peers_can_be_told_apart():
    looks = [tuple(plots.style(peer).values()) for peer in PEERS]
    assert len(set(looks)) == len(PEERS)
    assert len({plots.style(peer)["color"] for peer in scaling.COMPARED}) == len(scaling.COMPARED)
    assert plots.style("of another version")["marker"] not in {marker for _, marker in looks}


def test_command_writes_the_same_bytes_twice(tmp_path, capsys):
    files = {"scaling.json": scaling_result(), "bench.json": ordinary_result(), "ceilings.json": CEILINGS}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    results = [str(tmp_path / name) for name in ("scaling.json", "bench.json")]
    for folder in ("a", "b"):
        output = str(tmp_path / folder)
        assert plots.main([*results, "--ceilings", str(tmp_path / "ceilings.json"), "--output", output]) == 0
    names = {"scaling_time.png", "scaling_memory.png", "roofline.png"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    for name in names:
        content = (tmp_path / "a" / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert content == (tmp_path / "b" / name).read_bytes()
        assert len(content) < 150_000
        assert b"tEXt" not in content  # neither date nor program
    assert capsys.readouterr().out.count(".png") == 6


def test_what_does_not_belong_together_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one scaling result"):
        plots.figures([scaling_result(), scaling_result()])
    with pytest.raises(ValueError, match="of one device"):
        plots.figures([ordinary_result()], {**CEILINGS, "device": "an accelerator"})
    path = tmp_path / "scaling.json"
    path.write_text(json.dumps(scaling_result()))
    with pytest.raises(CommandError, match="one scaling result"):
        plots.main([str(path), str(path), "--output", str(tmp_path)])
