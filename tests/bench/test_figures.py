"""`python -m bench figures`, `repeat` and `threads`: what they would measure, where it goes, how it is compared."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bench.cases import find_case
from bench.measuring import run as run_command
from bench.peers import FLOOR, OURS, PEAK
from bench.report import machine_page, spread
from bench.studies import figures, repeat, scaling, threads
from unisd.cli.errors import CommandError

CPU = torch.device("cpu")
PARTS = (*figures.OPERATIONS, *figures.STEPS)
ENVIRONMENT = {
    "cpu": "AMD EPYC",
    "instruction_set": "AVX512",
    "threads": 2,
    "device": "cpu",
    "python": "3",
    "versions": {},
    "commit": "abc",
    "command": "python -m bench",
    "date": "2026-11-26T10:00:00",
    "processor": {"family": "25", "model": "17", "cores": 2, "usable_cores": 2, "numa_nodes": 1, "instructions": []},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "RESULTS", tmp_path / "results")
    made = figures.folder_here()
    made.mkdir(parents=True)
    return made


def test_every_part_is_a_command_whose_result_has_a_section():
    # The certificate's commands take a file of rows, which is not in the repository.
    assert {part.name for part in PARTS} == machine_page.shown() - {"certificate", "certificate_fp8"}
    for part in PARTS:
        command, *words = part.words
        if command == "run":
            options = run_command.parse(words)
            assert all(find_case(name, CPU).name == name for name in options.case)
        elif command == "scaling":
            assert scaling.parse(words).peers
        elif command == "steps":
            assert "--presets" not in words, "every preset that distils"
    assert all(find_case(name, CPU).name == name for name in repeat.CASES)
    assert sum(part.minutes for part in figures.OPERATIONS) < 22
    assert sum(part.minutes for part in figures.STEPS) < 40


def test_one_part_that_fails_does_not_end_the_others(folder, monkeypatch, capsys):
    asked = []

    def status(command):
        output = figures.ROOT / command[-1]
        asked.append((command[3], output.parent == folder))
        if "ceilings" in command:
            return 1
        said = shlex.join(["python", *command[1:]])
        output.write_text(json.dumps({"environment": {**ENVIRONMENT, "command": said}}))
        return 0

    monkeypatch.setattr(figures, "_status", status)
    parts = [part for part in figures.OPERATIONS if part.name in ("ceilings", "ema", "numerics")]
    assert figures.run(parts, folder) == ["ceilings: status 1, nothing written"]
    assert asked == [("ceilings", True), ("ema", True), ("numerics", True)]
    said = capsys.readouterr().out
    assert "[2/3] ema: about 0.5 minutes; 0.0 of about 1 have passed" in said
    # What they took is what they are expected to take the next time; of the one that failed nothing is known.
    known = figures.minutes_of(parts, folder)
    assert known["ceilings"] == 0.3
    assert known["ema"] < 0.1
    assert figures.plan(parts, known, folder).startswith("0 minutes into ")
    # Of another command than then nothing is known either.
    (ema,) = (part for part in parts if part.name == "ema")
    longer = replace(ema, words=(*ema.words, "--rounds", "9"))
    assert figures.minutes_of([longer], folder) == {"ema": 0.5}


def test_the_list_measures_nothing(folder, monkeypatch, capsys):
    monkeypatch.setattr(figures, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(figures, "is_fetched", lambda name: False)
    monkeypatch.setattr(figures, "_status", None)
    assert figures.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert f"minutes into results/{folder.name}" in said
    assert "bfloat16: left out: no units for bfloat16" in said
    assert "smollm2: left out: its model is not in the cache" in said
    assert "  bfloat16 " not in said
    assert figures.main(["--list", "--steps"]) == 0
    assert "steps_gemma3: left out" in capsys.readouterr().out


def row(**fields):
    plain = {"case": "kl_cpu", "divergence": "forward KL", "peer": OURS, "ratio_to_floor": 1.0}
    return {**plain, "extra_peak_bytes": 50e6, "gradient_error": 1e-5, **fields}


@pytest.mark.parametrize(
    ("field", "first", "second", "within"),
    [
        ("ratio_to_floor", 1.0, 1.099, True),
        ("ratio_to_floor", 1.101, 1.0, False),
        ("share_of_peak", 0.8, 0.87, True),
        ("share_of_peak", 0.8, 0.89, False),
        ("extra_peak_bytes", 1e6, 8.9e6, True),
        ("extra_peak_bytes", 1e6, 9.1e6, False),
        ("extra_peak_bytes", 1000e6, 1099e6, True),
        ("gradient_error", 1e-5, 1.09e-5, True),
        ("gradient_error", 1e-5, 1.2e-5, False),
        ("value_error", 1e-8, 1e-7, True),
    ],
)
def test_the_spread_is_that_of_the_page(field, first, second, within):
    (pair,) = (
        pair for pair in spread.pairs([row(**{field: first})], [row(**{field: second})]) if pair.spread.field == field
    )
    assert pair.within is within


def test_two_files_or_two_folders(tmp_path, capsys):
    results = {
        "one": [row(), row(peer=FLOOR)],
        "two": [row(ratio_to_floor=1.05), row(peer=FLOOR)],
        "three": [row(ratio_to_floor=1.2), row(peer=FLOOR, ratio_to_floor=2.0)],
    }
    for name, rows in results.items():
        (tmp_path / name).mkdir()
        commit = "abc" if name == "one" else "def"
        whole = {"environment": {**ENVIRONMENT, "commit": commit}, "rows": rows}
        (tmp_path / name / "float32.json").write_text(json.dumps(whole))
    files = {name: str(tmp_path / name / "float32.json") for name in results}
    assert repeat.main(["--compare", files["one"], files["two"]]) == 0
    said = capsys.readouterr().out
    assert "between the two also differ: commit" in said
    # The floor's memory and error are figures, its ratio is none.
    assert "Within the spread: time / floor 1 of 1; extra peak memory, MB 2 of 2; error of the gradient 2 of 2." in said
    assert repeat.main(["--compare", str(tmp_path / "one"), str(tmp_path / "three")]) == 1
    said = capsys.readouterr().out
    assert "| kl_cpu, forward KL, unisd_kernels | time / floor | 1.00 | 1.20 | 20% | **without** |" in said
    assert "time / floor 0 of 1" in said
    (tmp_path / "none").mkdir()
    with pytest.raises(CommandError, match="no figure in common"):
        repeat.main(["--compare", str(tmp_path / "one"), str(tmp_path / "none")])
    # On the page, by when the runs were.
    first, second = ({"environment": ENVIRONMENT, "rows": results[name]} for name in ("one", "three"))
    assert "fixed on 2026-11-26, before either run" in spread.page_section(first, second)
    first["environment"] = {**ENVIRONMENT, "date": "2026-11-22T10:00:00"}
    assert "after these runs" in spread.page_section(first, second)


def test_a_second_run_needs_a_first(folder, monkeypatch, capsys):
    monkeypatch.setattr(repeat, "folder_here", lambda: folder)
    with pytest.raises(CommandError, match=r"there is no first run: .*run_1\.json is made by python -m bench repeat"):
        repeat.main(["--run", "2"])

    def measured(words):
        output = words[words.index("--output") + 1]
        ratio = 1.0 if "run_1" in output else 1.5
        whole = {"environment": ENVIRONMENT, "rows": [row(ratio_to_floor=ratio)]}
        (folder / output.rpartition("/")[2]).write_text(json.dumps(whole))
        return 0

    monkeypatch.setattr(repeat.run_command, "main", measured)
    assert repeat.main(["--run", "1"]) == 0
    assert repeat.main(["--run", "2"]) == 1
    assert "50% | **without** |" in capsys.readouterr().out


def test_settings_are_distinct():
    two = [threads.Setting(1, 2), threads.Setting(2, 2), threads.Setting(4, 2), threads.Setting(2, 1)]
    assert threads.settings(2) == two
    assert [str(two[place]) for place in (0, 2, 3)] == [
        "1 thread on 2 cores",
        "4 threads on 2 cores",
        "2 threads on 1 core",
    ]
    assert threads.settings(1) == [threads.Setting(1, 1), threads.Setting(2, 1)]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the cores of a process cannot be chosen")
def test_a_setting_is_what_its_process_gets(monkeypatch):
    before, seen = os.sched_getaffinity(0), []

    def process(command, env, stdout, check):
        seen.append((env["OMP_NUM_THREADS"], len(os.sched_getaffinity(0)), "MKL_NUM_THREADS" in env))
        words = command[4:]
        options = run_command.parse(words)
        assert options.memory == "here"
        assert options.threads == int(env["OMP_NUM_THREADS"])
        assert all(find_case(name, CPU).name == name for name in options.case)
        about = {"threads": int(env["OMP_NUM_THREADS"]), "processor": {"usable_cores": seen[-1][1]}}
        found = [{**row(dtype="float32", case=name), "ratio_p20": 1, "ratio_p80": 1} for name in options.case]
        options.output.write_text(json.dumps({"environment": about, "rows": found}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(threads.subprocess, "run", process)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    cases = threads.cases([32, 64], ("kl",))
    found = threads.measured(threads.Setting(3, 1), cases, (OURS, PEAK), 1)
    assert seen == [("3", 1, False)]
    assert os.sched_getaffinity(0) == before
    assert [(each["threads"], each["cores"]) for each in found] == [(3, 1)] * len(cases)
    result = {"threads": found, "small": [{**each, "num_rows": 32, "bar": 1.3} for each in found]}
    result |= {"small_setting": [2, 2], "environment": ENVIRONMENT}
    shown = threads.table(result)
    assert "| 3 threads on 1 core | float32 | kl | unisd_kernels | 1.00 | 1.00 to 1.00 |  |" in shown
    assert "NUMA nodes of the machine: 1" in shown
    assert "| 32 | float32 | kl | unisd_kernels | 1.00 (bar 1.3) |" in shown


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the cores of a process cannot be chosen")
def test_a_measurement_that_wrote_nothing_is_an_error(monkeypatch):
    monkeypatch.setattr(threads.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 9))
    with pytest.raises(CommandError, match="1 thread on 1 core: the measurement ended with status 9"):
        threads.measured(threads.Setting(1, 1), threads.cases([32], ("kl",)), (OURS,), 1)
    assert sys.executable
