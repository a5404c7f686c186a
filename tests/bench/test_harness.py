"""The harness sees a kernel that is slow or wrong; what its verdicts and its files say."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch

from bench.__main__ import main
from bench.cases import CASES, find_case
from bench.inputs import sets as input_sets
from bench.inputs.sets import make_inputs, more_inputs
from bench.measuring import energy, measure
from bench.peers import FLOOR, OURS, PEERS
from bench.records import results_file, verdict
from bench.report import compare
from bench.report.tables import table
from unisd.cli.errors import CommandError
from unisd_kernels.backends import extension
from unisd_kernels.backends.native import NativeBackend

CPU = torch.device("cpu")
# Large enough for the products to be most of the time.
CASE = "scaling.kl.N256.H256.V4096.K0"
native = pytest.mark.skipif(extension.cpu_unavailable() is not None, reason="the compiled library is absent")


def bench(tmp_path, name, *more, case=CASE):
    output = tmp_path / f"{name}.json"
    arguments = ["--device", "cpu", "--case", case, "--peers", OURS, "--rounds", "5", "--output", str(output), *more]
    return main(arguments), json.loads(output.read_text())["rows"]


@native
def test_a_slowed_kernel_is_caught(tmp_path, monkeypatch, capsys):
    status, before = bench(tmp_path, "before")
    assert status == 0
    kept = ["--against", str(tmp_path / "before.json")]
    gradient = NativeBackend.hidden_gradient

    def slowed(self, *arguments):
        for _ in range(8):
            gradient(self, *arguments)

    monkeypatch.setattr(NativeBackend, "hidden_gradient", slowed)
    capsys.readouterr()
    status, after = bench(tmp_path, "after", *kept)
    assert status == 0  # said, and a failure only where asked for
    said = capsys.readouterr().out
    assert f"{CASE}, forward KL, {OURS}: " in said
    assert "of the floor, before" in said
    assert after[1]["ratio_to_floor"] > 1.5 * before[1]["ratio_to_floor"]
    # The same rows again, so that only the status is asked for.
    monkeypatch.setattr("bench.measuring.run.measure", lambda *arguments, **settings: after)
    assert bench(tmp_path, "strict", *kept, "--strict")[0] == 1


@native
@pytest.mark.parametrize(
    ("case", "method", "spoil"),
    [
        (CASE, "hidden_gradient", lambda projection, gradient, out: out.mul_(1.001)),
        ("smoke.scoring", "score", lambda projection, rows, ids, running, held: running.target_logits.add_(1e-2)),
    ],
)
def test_a_wrong_kernel_is_caught(case, method, spoil, tmp_path, monkeypatch, capsys):
    """An error of a thousandth: far too small for a test of training to see."""
    assert bench(tmp_path, "right", case=case)[0] == 0
    capsys.readouterr()
    right = getattr(NativeBackend, method)

    def wrong(self, *arguments):
        right(self, *arguments)
        spoil(*arguments)

    monkeypatch.setattr(NativeBackend, method, wrong)
    status, rows = bench(tmp_path, "wrong", case=case)
    assert status == 1
    assert f"{OURS}: wrong, " in capsys.readouterr().out
    assert "(limit " in table(rows)


def row(**fields):
    plain = {
        "case": "a",
        "dtype": "float32",
        "divergence": "forward KL",
        "peer": OURS,
        "ratio_to_floor": 1.2,
        "ratio_p20": 1.19,
    }
    return {**plain, "ratio_p80": 1.22, **fields}


def test_bars():
    assert verdict.slow([row(bar=1.2)]) == []
    assert verdict.slow([row(bar=1.19)]) == ["a, forward KL, unisd_kernels: 1.20 of the floor, the bar is 1.19"]
    assert CASES["unisd_star_cpu"].bars == {0.0: 1.1, 0.5: 1.1}
    assert verdict.slow([row(peak_bar=0.85, share_of_peak=0.85)]) == []
    below = row(peak_bar=0.85, share_of_peak=0.84)
    assert verdict.slow([below]) == ["a, forward KL, unisd_kernels: 84% of the FMA peak, the bar is 85%"]


def test_agreement_of_two_runs(tmp_path, capsys):
    same, faster = (
        row(ratio_to_floor=1.1, ratio_p20=1.05, ratio_p80=1.15),
        row(ratio_to_floor=0.9, ratio_p20=0.9, ratio_p80=0.9),
    )
    assert verdict.agree(row(), same)
    # An accelerator's ratios have to be closer.
    near = {"ratio_to_floor": 1.04, "ratio_p20": 1.04, "ratio_p80": 1.04}
    assert verdict.agree(row(), row(**near))
    assert not verdict.agree(row(dtype="bfloat16"), row(dtype="bfloat16", **near))
    assert not verdict.agree(row(), faster)
    assert verdict.slower(row(), faster)
    assert not verdict.slower(faster, row())
    files = []
    for name, rows in (("first", [row()]), ("second", [same]), ("third", [faster]), ("none", [row(case="b")])):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"rows": rows}))
    for other, status in zip(files[1:3], (0, 1), strict=True):
        assert compare.main([str(files[0]), str(other)]) == status
    with pytest.raises(CommandError, match="no row with a ratio in common"):
        compare.main([str(files[0]), str(files[3])])
    assert "| **differ** |" in capsys.readouterr().out


@pytest.mark.parametrize("error", [2e-5, math.nan, math.inf])
def test_an_error_above_its_limit_is_wrong(error):
    fine = row(gradient_error=1e-6, gradient_error_limit=1e-5)
    assert verdict.wrong([fine]) == []
    assert len(verdict.wrong([{**fine, "gradient_error": error}])) == 1
    # Another's error is its own: shown, not a failure of this package.
    assert verdict.wrong([{**fine, "gradient_error": error, "peer": "other"}]) == []
    assert len(verdict.wrong([row(failure="out of memory"), row(failure="x", peer=FLOOR)])) == 2


def test_csv_holds_what_json_holds(tmp_path):
    paths = [tmp_path / f"result.{suffix}" for suffix in ("json", "csv")]
    result = {
        "environment": {"device": "cpu", "versions": {"torch": "2", "trl": None}, "commit": "abc"},
        "rows": measure.measure(CASES["smoke.kl"], CPU, 2, [FLOOR, OURS, "cut-cross-entropy"]),
    }
    for path in paths:
        results_file.write(path, result)
    rows = json.loads(paths[0].read_text())["rows"]
    with paths[1].open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows) == 3
    for line, expected in zip(lines, rows, strict=True):
        assert set(expected) <= set(line)
        assert line["versions"] == "torch=2 trl=None"
        assert [float(sample) for sample in line["samples_seconds"].split()] == expected.get("samples_seconds", [])
        for name, value in expected.items():
            if name != "samples_seconds":
                assert line[name] == str(value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.csv", "result.json"]
    with pytest.raises(ValueError, match=r"written as \.json or \.csv, got 'result.txt'"):
        results_file.write(tmp_path / "result.txt", result)


def test_inputs_go_round_further_than_a_cache_reaches(monkeypatch):
    case = CASES["smoke.kl"]
    monkeypatch.setattr(input_sets, "last_level_cache_bytes", lambda device: 3 * case.bytes_read - 1)
    first = make_inputs(case, CPU)
    sets = more_inputs(case, first, CPU)
    assert len(sets) == 4  # between two turns of one set, three others are read
    assert len({given.student_head.weight.data_ptr() for given in sets}) == 4
    assert not torch.equal(sets[0].student_head.weight, sets[1].student_head.weight)
    seen = []
    steps = [input_sets.rotating(lambda given: seen.append(given), sets, start) for start in (0, 1)]
    for _ in range(5):
        for step in steps:
            step()
    assert [id(given) for given in seen[::2]] == [id(sets[index]) for index in (0, 1, 2, 3, 0)]
    assert all(a is not b for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert input_sets.sets_for(10**12, 10**6) == 2
    assert input_sets.sets_for(1, 10**9) == input_sets.MOST_SETS


def test_every_peer_takes_what_it_is_given():
    """Not the inputs that it was made with: each set gives its own values."""
    case = CASES["smoke.kl"]
    for name in ("unisd_kernels", "dense float32", "dense bfloat16", "trl composed", "orda"):
        step = PEERS[name].build(case, 0.0, CPU)
        first, second = (step(make_inputs(case, CPU, seed)).value for seed in (0, 1))
        assert not torch.allclose(first, second), name


def test_names_of_cases():
    assert find_case("kl", CPU).name == "kl_cpu"
    assert find_case("kl", torch.device("cuda")).name == "llama3.1-8b.kl.8192"
    shaped = find_case("scaling.unisd_star.N64.H8.V100.K2", CPU)
    assert (shaped.num_rows, shaped.hidden_size, shaped.vocab_size, shaped.num_auxiliary) == (64, 8, 100, 2)
    assert find_case(shaped.name, CPU) == shaped
    with pytest.raises(ValueError, match="no case 'klk'; there are kl, "):
        find_case("klk", CPU)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--case", "klk"], "no case 'klk'"),
        (["--peers", "nobody"], "unknown nobody"),
        (["--output", "x.txt"], "x.txt"),
    ],
)
def test_unknown_names_end_the_command(arguments, said):
    """`python -m bench` prints it in a line, with status 2 (tests/cli/test_errors.py)."""
    with pytest.raises(CommandError, match=said):
        main(["--device", "cpu", *arguments])


def test_energy_is_the_counter_over_the_steps():
    class Clock:
        now = 0.0

    def step():
        Clock.now += 0.3

    joules = energy.joules_per_step(step, CPU, counter=lambda: 50 * Clock.now, clock=lambda: Clock.now)
    assert joules == pytest.approx(15.0)
    # None is claimed where none is reported.
    assert energy.joules_per_step(step, CPU) is None
