"""The suite of one call on a GPU: order, deadline, what survives a lost device, timing."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.cases import ACCELERATOR_CASES, CASES, HEADS
from bench.measuring import energy, setting, suite, timing
from bench.measuring import measure as measuring
from bench.measuring.deadline import Deadline
from bench.peers import FLOOR, OURS, PEERS, Peer
from bench.records.failures import OUT_OF_TIME
from bench.report.tables import report

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


class Clock:
    """A second passes at every look."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def run(entries, tmp_path, deadline=None, **settings):
    output = tmp_path / "bench.json"
    status = suite.run(entries, CPU, deadline or Deadline(1000), output, 2, 1, **settings)
    return status, json.loads(output.read_text())


def test_order_and_reach_of_the_gpu_plan():
    entries = suite.plan("gpu")
    names = [entry.case.name for entry in entries]
    headline = [f"llama3.1-8b.{operation}.8192" for operation in ("kl", "kl_trainable", "unisd_star", "scoring")]
    # First what nobody else can measure, then the same with the others.
    assert names[:8] == headline * 2
    assert all(set(entry.peers) == {FLOOR, OURS, "unisd fused", "unisd chunked"} for entry in entries[:4])
    assert any("trl composed" in entry.peers for entry in entries[4:8])
    assert entries == [entry for part in suite.PARTS for entry in suite.plan(part)]
    assert set(names) == {case.name for case in ACCELERATOR_CASES}
    for shape in HEADS:
        rows = {case.num_rows for case in ACCELERATOR_CASES if case.name.startswith(f"{shape}.unisd_star")}
        assert rows == ({256, 2048, 8192, 32768} if shape == "llama3.1-8b" else {8192})
    first_other_rows = names.index("llama3.1-8b.kl.2048")
    assert all(names.index(f"{shape}.kl.8192") < first_other_rows for shape in HEADS)
    # torch.compile comes last, for two row counts of one head.
    last = [entry for entry in entries if "dense float32 compiled" in entry.peers]
    assert entries[-len(last) :] == last
    assert {(entry.case.hidden_size, entry.case.num_rows) for entry in last} == {(4096, 8192), (4096, 2048)}
    assert all(entry.peers[0] == FLOOR for entry in entries)
    assert all(entry.case.operation in PEERS[peer].operations for entry in entries for peer in entry.peers)
    assert len({entry.key for entry in entries}) == len(entries)


def test_accelerator_cases_say_what_they_are():
    for case in ACCELERATOR_CASES:
        shape, operation, rows = case.name.rsplit(".", 2)
        assert (case.hidden_size, case.vocab_size) == HEADS[shape]
        assert case.num_rows == int(rows)
        assert case.dtype == torch.bfloat16
        products = {"kl": 3, "kl_trainable": 4, "unisd_star": 7, "scoring": 1}
        assert case.num_products == products[operation]
        assert case.bars == {0.0: 1.1 if operation == "scoring" else 1.15}


def test_the_smoke_suite_runs_every_operation(tmp_path):
    entries = [replace(entry, peers=(FLOOR, OURS, "unisd torch")) for entry in suite.plan("smoke")]
    status, result = run(entries, tmp_path)
    assert status == 0
    assert {CASES[row["case"]].operation for row in result["rows"]} == {"unisd_loss", "divergence", "scoring"}
    assert result["left_out"] == []
    text = report(result)
    for row in result["rows"]:
        assert len(row["samples_seconds"]) == 2
        assert row["p20_seconds"] <= row["median_seconds"] <= row["p80_seconds"]
    assert text.count("| unisd_kernels |") == 5  # the loss has two divergences
    assert "error of log p" in text
    assert text.endswith("Left out: nothing.")


def test_a_deadline_leaves_cases_out_and_says_so(tmp_path):
    entries = suite.plan("smoke")
    status, result = run(entries, tmp_path, Deadline(-1))
    assert status == 0
    assert result["rows"] == []
    assert [entry["case"] for entry in result["left_out"]] == [entry.case.name for entry in entries]
    text = report(result)
    assert all(f"- {entry.case.name} (" in text for entry in entries)
    assert "not reached before the deadline" in text


def test_a_deadline_within_a_case(tmp_path):
    """The floor and the next peer are begun, the others are not; the cases after it neither."""
    entries = [replace(entry, peers=(FLOOR, OURS, "dense float32", "unisd torch")) for entry in suite.plan("smoke")]
    # Looks at the clock: the deadline itself, the entry, its line of progress, then one for each peer.
    status, result = run(entries, tmp_path, Deadline(4.5, Clock()))
    assert status == 0
    failures = {row["peer"]: row.get("failure") for row in result["rows"]}
    assert failures == {
        FLOOR: None,
        OURS: None,
        "dense float32": OUT_OF_TIME,
        "unisd torch": OUT_OF_TIME,
    }
    # A case that was begun has at least one sample of each peer that was.
    assert [len(row["samples_seconds"]) for row in result["rows"][:2]] == [1, 1]
    left = {(entry["case"], tuple(entry["peers"])) for entry in result["left_out"]}
    assert ("smoke.kl", ("dense float32",)) in left
    assert {case for case, _ in left} == {entry.case.name for entry in entries}


def test_a_lost_device_costs_one_entry(tmp_path, monkeypatch):
    def fatal(case, beta, device):
        def step(inputs):
            raise RuntimeError("an illegal memory access was encountered")

        return step

    monkeypatch.setitem(PEERS, "fatal", Peer("fatal", fatal))
    first, second = suite.plan("smoke")[:2]
    entries = [replace(first, peers=(FLOOR, OURS, "fatal")), replace(second, peers=(FLOOR, OURS))]
    with monkeypatch.context() as lost:
        lost.setattr(measuring, "device_lost", lambda device: "illegal memory access")
        status, result = run(entries, tmp_path)
    assert status == suite.DEVICE_LOST
    assert [entry["case"] for entry in result["left_out"]] == [second.case.name]
    assert "illegal memory access" in report(result)
    # A fresh process goes on with the rest, and the failure is not forgotten.
    status, result = run(entries, tmp_path, resume=True)
    assert status == 1
    assert result["left_out"] == []
    assert [row["peer"] for row in result["rows"]] == [FLOOR, OURS, "fatal", FLOOR, OURS]
    assert "took the device with it" in result["rows"][1]["failure"]


def hanging(output, errors):
    """The main function of a process: peers that hang and crash, its standard error in a file."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.__stderr__.fileno())
    torch.set_num_threads(1)
    measuring.SHORTEST_ON_CPU, measuring.MEMORY_APART = 0.01, False

    def hang(case, beta, device):
        time.sleep(600)

    def crash(case, beta, device):
        faulthandler._sigsegv()

    PEERS["hang"], PEERS["crash"] = Peer("hang", hang), Peer("crash", crash)
    cases = [entry.case for entry in suite.plan("smoke")[:2]]
    entries = [suite.Entry(case, (FLOOR, OURS, "crash", "hang", "unisd torch")) for case in cases]
    sys.stderr = sys.__stderr__
    sys.exit(suite.run(entries, CPU, Deadline(1000), output, 1, 1, resume=True, watchdog_seconds=15.0))


def test_a_peer_that_hangs_or_crashes_costs_itself(tmp_path):
    """Three processes: the first is lost to a crash, the second to a call that does not return."""
    output, errors = tmp_path / "bench.json", tmp_path / "errors.txt"
    # Forked from one that has imported everything.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def process():
        child = context.Process(target=hanging, args=(output, errors))
        child.start()
        child.join(timeout=120)
        return child.exitcode

    assert process() == -signal.SIGSEGV
    result = json.loads(output.read_text())
    # What came before the culprit is there already, and says that it was not timed.
    assert [row["peer"] for row in result["rows"]] == [FLOOR, OURS]
    assert all("not timed" in row["failure"] and "gradient_error" in row for row in result["rows"][1:])
    assert process() == 1
    assert "Timeout (0:00:15)" in errors.read_text()
    assert "in hang" in errors.read_text()  # where it hung
    assert process() == 0
    result = json.loads(output.read_text())
    assert not suite.in_flight(output).exists()
    assert result["left_out"] == []
    for rows in (result["rows"][:5], result["rows"][5:]):
        failures = {row["peer"]: row.get("failure") for row in rows}
        assert failures.pop("crash").startswith("ended the process in its first call of smoke.kl: a crash, or no")
        assert failures.pop("hang").startswith("ended the process in its first call of smoke.kl")
        assert failures == {FLOOR: None, OURS: None, "unisd torch": None}


def test_a_failing_energy_counter_costs_the_joules_only(tmp_path, monkeypatch):
    def broken(step, device):
        raise energy.NoEnergy("NVML: GPU is lost")

    monkeypatch.setattr(measuring, "joules_per_step", broken)
    floor, ours = measuring.measure(CASES["smoke.scoring"], CPU, 2, (FLOOR, OURS), with_energy=True)
    assert "median_seconds" in ours
    assert "joules" not in ours
    assert "no joules: NVML: GPU is lost" in ours["note"]
    assert floor["note"].startswith("bare matrix products")


def test_a_case_that_cannot_be_prepared_costs_itself(tmp_path, monkeypatch):
    first, second = (replace(entry, peers=(FLOOR, OURS)) for entry in suite.plan("smoke")[:2])
    prepare = setting.make_inputs

    def refuse_the_first(case, device):
        if case.name == first.case.name:
            raise torch.OutOfMemoryError
        return prepare(case, device)

    monkeypatch.setattr(setting, "make_inputs", refuse_the_first)
    status, result = run([first, second], tmp_path)
    assert status == 1
    assert {row["case"] for row in result["rows"]} == {second.case.name}
    assert f"- {first.case.name} (gemm floor, unisd_kernels): could not be prepared: out of memory" in report(result)


def test_a_default_that_fails_fails_the_suite(tmp_path, monkeypatch):
    def broken(case, beta, device):
        raise RuntimeError("no")

    monkeypatch.setitem(PEERS, OURS, Peer(OURS, broken))
    status, _ = run([replace(suite.plan("smoke")[0], peers=(FLOOR, OURS))], tmp_path)
    assert status == 1


def test_a_slow_peer_shows_in_the_ratio():
    samples = {"a": [2.0, 4.0, 9.0], "floor": [1.0, 2.0, 3.0]}
    assert timing.spread(timing.ratios(samples, "a", "floor")).median == 2.0


def test_peers_with_fewer_rounds_are_compared_within_theirs():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in ("floor", "peer")}
    samples = timing.interleaved_seconds(steps, 5, CPU, fewer_rounds={"peer": 2})
    assert {name: len(values) for name, values in samples.items()} == {"floor": 5, "peer": 2}
    assert calls[:6] == ["floor", "peer", "peer", "floor", "floor", "peer"]  # the first two do not count
    assert timing.ratios({"floor": [1.0, 2.0, 50.0], "peer": [3.0, 6.0]}, "peer", "floor") == [3.0, 3.0]


def test_short_steps_are_repeated_within_a_sample():
    assert timing.repetitions_for(0.5e-3) == 4
    assert timing.repetitions_for(3e-3) == 1
    assert timing.repetitions_for(1e-7) == timing.MOST_REPETITIONS
    spread = timing.spread([4.0, 1.0, 2.0, 3.0, 5.0, 6.0])
    assert spread == pytest.approx((3.5, 2.0, 5.0))


def test_short_steps_fill_a_sample_on_a_cpu():
    calls = []

    def step():
        calls.append(0)
        time.sleep(0.01)

    (sample,) = timing.interleaved_seconds({"a": step}, 1, CPU, warm=True, shortest_on_cpu=0.05)["a"]
    assert 3 <= len(calls) <= 5
    assert 0.01 <= sample < 0.03
    calls.clear()
    timing.interleaved_seconds({"a": step}, 1, CPU, warm=True)
    assert len(calls) == 1
