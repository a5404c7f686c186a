"""`python -m bench study`: the same for every method, side by side, on after a kill; what is made of the results."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from bench.__main__ import main
from bench.report import study_statistics
from bench.report.study_mixtures import mixtures_section
from bench.studies import study, study_jobs
from bench.studies.study_methods import ALONE, MIXED, SEEDED
from bench.studies.study_plan import Sizes, planned
from unisd.cli.errors import CommandError
from unisd.compare.runs import EVALUATIONS

needs_fork = pytest.mark.skipif(not study_jobs.FORKS, reason="no fork here")


def plan(part, root):
    return planned(part, Sizes(), root / "cos_e", root / "test.jsonl")


def test_every_method_is_trained_and_asked_alike(tmp_path):
    runs = plan("study", tmp_path)
    for data in ("procedural", "cos_e"):
        mine = [run for run in runs if run.cell is not None and run.name.startswith(data)]
        assert len({run.train for run in mine}) == len({run.evaluations[0] for run in mine}) == 1
        counts = {preset: sum(run.cell.preset == preset for run in mine) for preset in (*SEEDED, *ALONE)}
        assert counts == {**dict.fromkeys(SEEDED, 3), **dict.fromkeys(ALONE, 1)}
        assert mine[0].evaluations[0] in runs[0].evaluations, "the base is asked the same"


def test_only_the_budget_differs(tmp_path):
    free, *kept = plan("budget", tmp_path)
    assert all(run.train == (*free.train, "--drift_budget", "0.02") for run in kept)
    assert [run.cell.seed for run in kept] == [0, 1, 2]


def test_mixtures_are_run_as_the_study_runs_what_they_are_compared_with(tmp_path):
    study_runs, mixed = plan("study", tmp_path), plan("mixtures", tmp_path)
    beside = {run.name for run in mixed if not run.variant and run.cell.preset not in MIXED}
    for run in mixed:
        preset = "plain" if run.cell.preset in MIXED else run.cell.preset
        (other,) = (each for each in study_runs if each.name == run.name.replace(run.cell.preset, preset))
        extra = ("--teacher_mixture", run.variant.removeprefix("sdft_")) if run.variant else ()
        assert run.train == (*other.train, *extra)
        assert run.evaluations[0] == other.evaluations[0]
        assert other.name in beside, "another processor trains another model: its baseline runs here too"
    assert {run.variant for run in mixed} == {"", "sdft_consensus", "sdft_contrastive", "sdft_pmi"}
    assert len(beside) == len(mixed) - 2 * len(MIXED) - 3 * len(MIXED), "no run that none is compared with"


@needs_fork
def test_two_at_a_time(tmp_path, capfd):
    """Each of the first two ends only once the other has begun."""

    def meet(mine, other):
        (tmp_path / mine).touch()
        until = time.monotonic() + 10
        while not (tmp_path / other).exists() and time.monotonic() < until:
            time.sleep(0.005)
        return int(not (tmp_path / other).exists())

    def fails():
        raise ValueError("a broken run")

    work = [("a", lambda: meet("a", "b")), ("b", lambda: meet("b", "a")), ("c", fails), ("d", lambda: 0)]
    said = []
    assert study_jobs.run_side_by_side(work, 2, said.append) == ["c"]
    assert [line.split()[0] for line in said] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert sum("FAILED" in line for line in said) == 1
    assert said[-1].endswith("about 0 minutes left")
    assert "a broken run" in capfd.readouterr().err


@needs_fork
def test_a_command_leaves_its_log_and_its_cost(tmp_path):
    log = tmp_path / "logs" / "one.log"
    assert study_jobs.launch(["presets"], log) == 0
    assert study_jobs.launch(["nonsense"], log) == 2
    assert "unisd presets\n" in log.read_text()
    assert "there is no command 'nonsense'" in log.read_text()
    costs = [json.loads(line) for line in (tmp_path / "logs" / "one.costs.jsonl").read_text().splitlines()]
    assert [cost["command"] for cost in costs] == ["presets", "nonsense"]
    assert costs[0]["status"] == 0 != costs[1]["status"]
    assert costs[0]["peak_memory_gib"] > 0


@needs_fork
def test_nothing_outlives_a_kill(tmp_path):
    def sleeps():
        (tmp_path / "pid").write_text(str(os.getpid()))
        os.rename(tmp_path / "pid", tmp_path / "began")
        time.sleep(60)
        return 0

    parent = os.fork()
    if parent == 0:
        study_jobs.run_side_by_side([("one", sleeps)], 1, str)
        os._exit(0)
    until = time.monotonic() + 20
    while not (tmp_path / "began").exists():
        assert time.monotonic() < until
        time.sleep(0.005)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    child = Path("/proc", (tmp_path / "began").read_text(), "stat")
    while child.exists() and child.read_text().split(")")[1].split()[0] != "Z":
        assert time.monotonic() < until, "the run outlived the study"
        time.sleep(0.005)


def pretend(words, log):
    """Writes what a command would; the training of seed 1 fails the first time."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        print(*words, file=stream)
    if words[0] == "train":
        folder = log.parent.parent / log.stem
        if log.stem.endswith("-1") and not folder.exists():
            folder.mkdir()
            log.write_text("RuntimeError: no luck\n")
            return 1
        folder.mkdir(exist_ok=True)
        (folder / "unisd_config.yaml").write_text(yaml.safe_dump({"seed": 0}))
        log_history = [{"step": 2, "unisd/drift_kl": 0.04, "loss": 1.5}, {"step": 2, "train_runtime": 3.0}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": log_history}))
    else:
        folder = log.parent.parent / log.stem / EVALUATIONS
        folder.mkdir(parents=True)
        scores = {name: {"value": 0.5, "low": 0.1, "high": 0.9, "count": 2} for name in ("accuracy", "answered")}
        result = {"benchmark": "procedural", "kind": "procedural", "scores": scores, "model": "/a/secret/path"}
        (folder / "procedural.json").write_text(json.dumps(result))
        replies = ("x1 = 2 + 3 = 5\nwords", "x1 = 2 + 3 = 6\nAnswer: 5")
        rows = [{"number": n, "accuracy": float(n), "answered": 1.0, "reply": replies[n]} for n in (1, 0)]
        rows = [{**row, "gold": "x1 = 2 + 3 = 5\nAnswer: 5"} for row in rows]
        (folder / "procedural.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    took = {"command": words[0], "status": 0, "seconds": 2.0, "core_seconds": 1.5, "peak_memory_gib": 0.5}
    with log.with_suffix(study_jobs.COSTS).open("a") as stream:
        stream.write(json.dumps(took) + "\n")
    return 0


def test_it_goes_on_where_it_was(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(study_jobs, "launch", pretend)
    monkeypatch.setattr(study_jobs, "warm", lambda: None)
    monkeypatch.setattr(sys, "argv", ["bench/__main__.py", "study", "-o", str(tmp_path)])
    words = ["study", "-o", str(tmp_path / "runs"), "--part", "budget", "--results", str(tmp_path)]
    assert main([*words, "--report"]) == 0
    assert "0 runs:" in capfd.readouterr().out
    assert main(words) == 1
    said = capfd.readouterr()
    assert "RuntimeError: no luck" in said.out
    assert "1 failed: budget/kept/procedural-sdft-1; the same command tries them again" in said.err
    assert main(words) == 0
    assert "4 runs, 3 of them finished before" in capfd.readouterr().out
    trained = (tmp_path / "runs" / "budget" / "kept" / "logs" / "procedural-sdft-0.log").read_text()
    assert trained.count("train --dataset procedural --preset sdft --seed 0") == 1
    text = (tmp_path / "study_budget_cpu.json").read_text()
    assert str(tmp_path) not in text
    assert "secret" not in text
    assert "words" not in text
    run = json.loads(text)["runs"][1]
    assert (run["name"], run["variant"], run["steps"], run["drift_kl"]) == ("procedural-sdft-0", "kept", 2, 0.04)
    assert run["evaluations"]["procedural"]["digits"] == {"accuracy": "01", "answered": "11", "worked": "10"}
    assert run["cost"]["train"]["core_seconds"] == 1.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cos-e-test", "x.jsonl"], "--cos-e is missing: give a file of CoS-E"),
        (["--report"], "--report writes nothing without --results DIR"),
    ],
)
def test_mistakes_are_refused(tmp_path, words, message):
    with pytest.raises(CommandError, match=message):
        study.main(["-o", str(tmp_path), *words])


def made(preset, digits, value, seed=0):
    found = {"digits": {"accuracy": digits}, "scores": {"accuracy": {"value": value}}}
    return {"preset": preset, "data": "procedural", "seed": seed, "evaluations": {"procedural": found}}


def test_seeds_and_items_are_drawn():
    runs = [
        made("base", "0000", 0.0),
        made("sft", "1100", 0.5),
        made("sft", "1000", 0.25, 1),
        made("gkd", "0001", 0.25),
    ]
    runs[0]["data"] = None
    groups = study_statistics.by_method(runs, "procedural")
    assert list(groups) == ["base", "sft", "gkd"]
    gain = study_statistics.difference(groups["base"], groups["sft"], "procedural", "accuracy")
    assert gain.value == 0.375
    assert study_statistics.difference(groups["sft"], groups["base"], "procedural", "accuracy").value == -0.375
    assert study_statistics.range_over_seeds(groups["sft"], "procedural", "accuracy") == (0.25, 0.5)
    one = study_statistics.share(groups["gkd"], "procedural", "accuracy")
    assert 0 < one.low < 0.25 < one.high, "Wilson's of one run"
    assert not gain.leaves_out_zero
    none = study_statistics.share([runs[0], runs[0]], "procedural", "accuracy")
    assert none.value == none.low == 0.0 < none.high


def test_a_gain_of_some_seeds_alone_is_not_significant():
    """The items alone would say so: they agree within every run."""
    base = [made("base", "0" * 100, 0.0, None)]
    all_seeds = [made("gkd", "1" * 40 + "0" * 60, 0.4, seed) for seed in range(3)]
    some_seeds = [*all_seeds[:2], made("gkd", "0" * 100, 0.0, 2)]
    alike = study_statistics.difference(base, all_seeds, "procedural", "accuracy")
    assert 0.25 < alike.low < alike.value == 0.4 < alike.high < 0.55
    uneven = study_statistics.difference(base, some_seeds, "procedural", "accuracy")
    assert uneven.low == 0.0 < 0.4 < uneven.high
    assert not uneven.leaves_out_zero


def test_runs_are_compared_seed_by_seed():
    first = [made("sft", digits, 0.5, seed) for seed, digits in enumerate(("1100", "0110", "0011"))]
    second = [made("gkd", digits, 0.75, seed) for seed, digits in enumerate(("1110", "0111", "1011"))]
    one_more = study_statistics.difference(first, second, "procedural", "accuracy")
    assert one_more.value == 0.25
    with pytest.raises(ValueError, match=r"got the seeds \[0, 1, 2\] and \[1, 2\]"):
        study_statistics.difference(first, second[1:], "procedural", "accuracy")


def run_of(preset, digits, seed=0, variant="", loss=1.0):
    """A run as the page of the mixtures reads it."""
    run = made(preset, digits, digits.count("1") / len(digits), seed)
    found = run["evaluations"]["procedural"]
    found["digits"]["answered"] = digits
    found["scores"]["answered"] = found["scores"]["accuracy"]
    found["overall"] = {"perplexity": 1.5}
    cost = {"train": {"core_seconds": 100.0}, "eval": {"core_seconds": 20.0}}
    return {**run, "variant": variant, "drift_kl": 0.01 + 0.01 * seed, "curves": {"loss": [[1, loss]]}, "cost": cost}


def test_a_mixture_stands_beside_the_same_method_without_one():
    runs = [run_of("plain", "0000"), *(run_of("sdft", "0001", seed) for seed in range(3))]
    mine = [
        *(run_of("sdft", "0100", seed) for seed in range(3)),
        *(run_of("sdft", "0111", seed, "sdft_pmi") for seed in (0, 1)),
        run_of("plain", "0000"),
        run_of("consensus", "1100"),
    ]
    result = {"sizes": {"steps": 12, "batch_size": 4}, "runs": mine}
    text = mixtures_section(result, runs, "the machine.")
    assert "changes the accuracy of SDFT by `pmi` +50 [" in text
    assert "points (2 seeds; 95% intervals over seeds and items): beyond chance for none of them." in text
    assert "loss for loss and item for item the same" in text
    assert "| Procedural tasks | SDFT | 3 | 25%" in text
    assert "| Procedural tasks | `consensus` | 1 | 50% [15, 85] | +50 " in text
    assert "| Procedural tasks | SDFT with `pmi` | 2 | 75%" in text
    (of_pmi,) = (line for line in text.splitlines() if "SDFT with `pmi` |" in line)
    assert "| +50 [" in of_pmi, "of the two seeds run beside it, not of the study's"
    assert "0.015 (0.010 to 0.020) (without 0.015)" in of_pmi
    assert "840 seconds of a core for 7 runs" in text
    assert "Not run for time: `contrastive_teacher` on Procedural tasks" in text
    assert "seed 2 of SDFT with `pmi`" in text
    assert "float32" not in text
    sizes = {"steps": 12, "batch_size": 4, "dtype": "float32"}
    other = mixtures_section({"sizes": sizes, "runs": [*mine[:-2], run_of("plain", "1000", loss=2.0)]}, runs, "")
    assert "with other losses, +25 [" in other
    assert "but with weights in float32" in other
    assert "was not repeated" in mixtures_section({**result, "runs": mine[:1]}, runs, "")
    assert "Not run yet" in mixtures_section(None, runs, "")
