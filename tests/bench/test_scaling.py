"""The scaling command: fits of rows whose laws are known, and what it writes."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from bench.cases import find_case
from bench.measuring.measure import measure
from bench.peers import FLOOR, OURS
from bench.records.results_file import case_fields
from bench.records.verdict import is_wrong
from bench.studies import scaling
from unisd.cli.errors import CommandError

CPU = torch.device("cpu")
PRODUCT = 2e-3  # seconds of a bare product of the synthetic floor at any K


def synthetic(time, memory, peers=(FLOOR, OURS)):
    """Rows of the CPU plan: the floor takes `PRODUCT` a product, the others what the functions of a case say."""
    cases = scaling.CPU_PLAN.sweeps("unisd_star")
    rows = []
    for case in {case.name: case for of_axis in cases.values() for case in of_axis}.values():
        for peer in peers:
            row = {**case_fields(case), "peer": peer, "divergence": "forward KL"}
            if peer == FLOOR:
                rows.append({**row, "median_seconds": PRODUCT * case.num_products})
            else:
                rows.append({**row, "median_seconds": time(case), "extra_peak_bytes": memory(case)})
    return scaling.result_of(rows, cases, scaling.CPU_PLAN.case("unisd_star"), {"device": "cpu"})


def law(case):
    return case.num_rows * case.vocab_size**0.5 * (3 + 1.25 * case.num_auxiliary) * PRODUCT


def fit_of(result, axis, quantity, peer=OURS):
    (fit,) = [fit for fit in result["fits"] if (fit["axis"], fit["peer"], fit["quantity"]) == (axis, peer, quantity)]
    return fit


def test_known_exponents_are_recovered():
    result = synthetic(law, lambda case: 7 * case.num_rows**2 / case.vocab_size)
    expected = {"N": (1, 2), "V": (0.5, -1), "H": (0, 0)}
    for axis, exponents in expected.items():
        for quantity, exponent in zip(scaling.QUANTITIES, exponents, strict=True):
            fit = fit_of(result, axis, quantity)
            assert fit["exponent"] == pytest.approx(exponent, abs=1e-9)
            assert fit["standard_error"] == pytest.approx(0, abs=1e-7)
            assert fit["points"] == len(scaling.CPU_PLAN.axes[axis])
            assert fit["left_out"] == 0


def test_standard_error_is_that_of_least_squares():
    line = scaling.fit_line([(0, 0.0), (1, 1.0), (2, 1.0), (3, 2.0)])
    assert line.slope == pytest.approx(0.6)
    assert line.intercept == pytest.approx(0.1)
    # Residuals -0.1, 0.3, -0.3, 0.1; two degrees of freedom; squared distances from the mean of x sum to 5.
    assert line.standard_error == pytest.approx(math.sqrt(0.2 / 2 / 5))


def test_time_is_affine_in_views_and_in_units_of_a_product():
    scale = 256 * 32768**0.5
    result = synthetic(law, lambda case: 5e6 + 2e6 * case.num_auxiliary)
    time, memory, floor = fit_of(result, "K", "time"), fit_of(result, "K", "memory"), fit_of(result, "K", "time", FLOOR)
    assert (time["slope"], time["intercept"]) == pytest.approx((1.25 * scale, 3 * scale))
    assert (memory["slope"], memory["intercept"]) == pytest.approx((2e6, 5e6))
    assert (floor["slope"], floor["intercept"]) == pytest.approx((1, 4))
    assert (time["unit"], memory["unit"]) == ("products", "bytes")
    assert time["exponent"] is None


def test_failures_are_left_out_and_counted():
    result = synthetic(law, lambda case: 1e6)
    for row in result["rows"]:
        if row["peer"] == OURS and row["num_rows"] >= 512:
            row["failure"] = "out of memory"
            row["median_seconds"] = 1e9  # would be seen
    fits = scaling.fits_of(result["rows"], result["sweeps"])
    fit = fit_of({"fits": fits}, "N", "time")
    assert fit["exponent"] == pytest.approx(1)
    assert (fit["points"], fit["left_out"]) == (3, 2)
    assert "| N | unisd_kernels | 1.00 ± 0.00 (2 left out) |" in scaling.table({**result, "fits": fits})


def test_a_rise_of_nothing_has_no_logarithm():
    result = synthetic(law, lambda case: 0 if case.num_rows == 64 else 4e6)
    fit = fit_of(result, "N", "memory")
    assert (fit["points"], fit["left_out"]) == (4, 1)


def test_too_few_points_have_no_fit():
    result = synthetic(law, lambda case: 1e6)
    rows = [row for row in result["rows"] if row["num_rows"] in (128, 256) and row["num_auxiliary"] in (1, 3)]
    fits = scaling.fits_of(rows, result["sweeps"])
    assert fit_of({"fits": fits}, "N", "time")["exponent"] is None
    assert fit_of({"fits": fits}, "K", "time")["slope"] is None
    assert "| N | unisd_kernels | no fit | no fit |" in scaling.table({**result, "fits": fits})


def test_without_a_floor_there_is_no_unit():
    fit = fit_of(synthetic(law, lambda case: 1e6, peers=(OURS,)), "K", "time")
    assert fit["slope"] is None
    assert fit["points"] == 6


@pytest.mark.parametrize("plan", [scaling.CPU_PLAN, scaling.ACCELERATOR_PLAN])
def test_sweeps_vary_one_axis_around_the_base(plan):
    base = plan.case("unisd_star")
    for axis, cases in plan.sweeps("unisd_star").items():
        assert base in cases
        for other, field in scaling.AXES.items():
            values = tuple(getattr(case, field) for case in cases)
            assert values == (plan.axes[axis] if other == axis else (plan.base[other],) * len(cases))
        assert all(case.dtype == plan.dtype for case in cases)
    assert set(plan.sweeps("kl")) == {"N", "V", "H"}
    assert plan.case("kl").num_auxiliary == 0


@pytest.mark.parametrize("plan", [scaling.CPU_PLAN, scaling.ACCELERATOR_PLAN])
def test_a_name_alone_is_enough(plan):
    case = plan.case("unisd_star", N=64)
    assert find_case(case.name, CPU) == case
    with pytest.raises(ValueError, match="no case"):
        find_case(f"{case.name}.float8", CPU)


def test_without_views_every_peer_has_the_loss():
    case = scaling.CPU_PLAN.case("unisd_star", N=16, V=300, H=16, K=0)
    rows = measure(case, CPU, 1, scaling.COMPARED)
    assert [row.get("failure") for row in rows] == [None] * len(scaling.COMPARED)
    assert not any(map(is_wrong, rows))
    assert rows[0]["num_products"] == 4


def test_the_cpu_plan_takes_minutes():
    """The base shape takes about 11 s on two cores with all peers and rounds."""
    cases = {case.name: case for of_axis in scaling.CPU_PLAN.sweeps("unisd_star").values() for case in of_axis}
    work = sum(case.flops for case in cases.values()) / scaling.CPU_PLAN.case("unisd_star").flops
    assert work < 25


def test_command_writes_the_schema(monkeypatch, tmp_path, capsys):
    axes = {"N": (8, 16, 32), "K": (1, 2, 3)}
    tiny = scaling.Plan({"N": 16, "V": 300, "H": 16, "K": 2}, axes, torch.float32)
    monkeypatch.setattr(scaling, "CPU_PLAN", tiny)
    monkeypatch.setattr(scaling, "COMPARED", (FLOOR, OURS))
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench/__main__.py", "scaling", "--device", "cpu"])
    output = tmp_path / "scaling.json"
    assert scaling.main(["--device", "cpu", "--rounds", "2", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert set(result) == {"environment", "base", "rows", "sweeps", "fits"}
    assert result["environment"]["command"] == "python -m bench scaling --device cpu"
    assert [sweep["axis"] for sweep in result["sweeps"]] == ["N", "K"]
    # Five shapes: the base is measured once.
    assert len(result["rows"]) == 5 * 2
    assert {row["case"] for row in result["rows"]} == {name for sweep in result["sweeps"] for name in sweep["cases"]}
    assert not any("failure" in row or is_wrong(row) for row in result["rows"])
    assert all(len(row["samples_seconds"]) == 2 for row in result["rows"])
    # Of each axis: the times of two peers, the memory of one.
    assert len(result["fits"]) == 2 * 3
    fields = {"axis", "peer", "quantity", "exponent", "standard_error", "points", "left_out"}
    assert all(fields <= set(fit) for fit in result["fits"])
    assert all(fit["points"] == 3 for fit in result["fits"] if fit["quantity"] == "time")
    assert "| peer | products per view |" in capsys.readouterr().out


def test_the_result_is_json_only(tmp_path):
    with pytest.raises(CommandError, match=r"\.json"):
        scaling.main(["--output", str(tmp_path / "scaling.csv")])


def test_a_lost_device_keeps_what_was_measured(monkeypatch, tmp_path):
    calls = []

    def lose_the_second(case, device, rounds, peers, **settings):
        calls.append(case.name)
        row = {**case_fields(case), "peer": OURS, "divergence": "forward KL", "median_seconds": 1.0}
        if len(calls) == 3:  # the first one warms up
            raise scaling.DeviceLost("gone", [{**row, "failure": "illegal memory access"}])
        return [row]

    monkeypatch.setattr(scaling, "measure", lose_the_second)
    output = tmp_path / "scaling.json"
    assert scaling.main(["--device", "cpu", "--output", str(output)]) == 1
    assert [row.get("failure") for row in json.loads(output.read_text())["rows"]] == [None, "illegal memory access"]
    assert len(calls) == 3
