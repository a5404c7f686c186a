"""The front ends of the benchmarks: the command line, `unisd bench` from any directory, and `pytest bench/`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch

from bench import __main__ as one_line
from bench.peers import FLOOR, OURS, PEERS
from bench.records.failures import NotHere
from unisd.cli import main
from unisd.cli.errors import CommandError

ROOT = Path(__file__).parents[2]
OPTIONS = ["bench/", "-p", "no:xdist", "-rsf", "--bench-device", "cpu"]


def run_pytest(monkeypatch, *arguments: str) -> int:
    """The exit status of a session within this one, which may be one of pytest-xdist's."""
    monkeypatch.chdir(ROOT)
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return pytest.main([*OPTIONS, *arguments])


def test_pytest_has_an_entry_for_each_peer(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pytest_benchmark")
    output = tmp_path / "result.json"
    cases, peers = ["smoke.kl", "smoke.scoring", "smoke"], [OURS, "dense float32", "liger triton"]
    options = ["--benchmark-only", "--benchmark-json", str(output), "--benchmark-min-rounds", "3"]
    assert run_pytest(monkeypatch, *options, "--bench-case", *cases, "--bench-peers", *peers) == 0
    said = capsys.readouterr().out
    assert "liger triton: not offered: liger triton has divergence only" in said
    result = json.loads(output.read_text())
    # In the order in which they ran: a group at a time.
    groups = {
        name: [row["extra_info"] for row in rows] for name, rows in groupby(result["benchmarks"], lambda b: b["group"])
    }
    assert list(groups) == ["smoke.kl, forward KL", "smoke.scoring", "smoke, forward KL", "smoke, JSD beta=0.5"]
    for name, rows in groups.items():
        assert [row["peer"] for row in rows] == [FLOOR, OURS, "dense float32"]
        assert f"benchmark '{name}': 3 tests" in said
        errors = {"value_error"} if name == "smoke.scoring" else {"gradient_error"}
        errors |= {"value_error"} if name.startswith("smoke.kl") else set()
        for row in rows:
            assert {field for field in row if field.endswith("_error")} == (set() if row["peer"] == FLOOR else errors)
            assert all(row[field] <= row[f"{field}_limit"] for field in errors if row["peer"] != FLOOR)
            assert (row["num_rows"], row["vocab_size"], row["dtype"], row["device"]) == (32, 500, "float32", "cpu")
    assert all(row["stats"]["rounds"] == 3 for row in result["benchmarks"])
    assert result["machine_info"]["unisd"]["versions"]["torch"]


def test_pytest_fails_for_a_wrong_kernel_and_says_why_others_are_skipped(monkeypatch, capsys):
    """Peers that fail in every way that there is, and this package with a wrong gradient."""
    pytest.importorskip("pytest_benchmark")
    make = PEERS[OURS].make

    def failing(error):
        def make(case, beta, device):
            raise error

        return make

    def wrong(case, beta, device):
        step = make(case, beta, device)
        return lambda inputs: step(inputs)._replace(gradient=step(inputs).gradient * 1.001)

    makes = {
        OURS: wrong,
        "liger triton": failing(NotHere("needs a GPU")),
        "liger kl": failing(ImportError("No module named 'liger_kernel'")),
        "orda": failing(torch.OutOfMemoryError("much text")),
        "trl composed": failing(RuntimeError("broken")),
    }
    for name, make_step in makes.items():
        monkeypatch.setitem(PEERS, name, replace(PEERS[name], make=make_step))
    # Without --benchmark-only, and with its tables and rounds off.
    options = ["--benchmark-disable", "--bench-case", "smoke.kl", "--bench-peers", *makes]
    assert run_pytest(monkeypatch, *options) == pytest.ExitCode.TESTS_FAILED
    said = capsys.readouterr().out
    assert "AssertionError: unisd_kernels: gradient error 1.0e-03, at most 1." in said
    assert "liger triton: not on this machine: needs a GPU" in said
    assert "liger kl: not installed: No module named 'liger_kernel'" in said
    assert "orda: out of memory\n" in said
    assert "RuntimeError: broken" in said
    assert "2 failed, 1 passed, 3 skipped" in said


def test_pytest_refuses_an_unknown_case(monkeypatch, capsys):
    assert run_pytest(monkeypatch, "--bench-case", "smoke.nothing") == pytest.ExitCode.USAGE_ERROR
    assert "no case 'smoke.nothing'; there are kl, " in capsys.readouterr().err


def test_the_command_runs_in_another_directory(tmp_path):
    """With the repository on the path, as an editable install leaves it."""
    script = "import sys; from unisd.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [
        "--case",
        "smoke.kl",
        "--device",
        "cpu",
        "--rounds",
        "2",
        "--peers",
        OURS,
        "--output",
        "x.json",
        "--memory",
        "here",
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, "bench", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["peer"] for row in rows] == [FLOOR, OURS]
    assert all(len(row["samples_seconds"]) == 2 for row in rows)


def test_an_unknown_case_is_an_error_that_names_the_cases(capsys):
    assert main(["bench", "--case", "smoke.nothing", "--device", "cpu"]) == 2
    message = capsys.readouterr().err
    assert "no case 'smoke.nothing'" in message
    assert "unisd_star_cpu" in message


@pytest.mark.parametrize("foreign", [None, "bench.py", "bench/__init__.py", "bench/__main__.py"])
def test_without_the_repository_it_says_where_the_benchmarks_are(foreign, monkeypatch, capsys, tmp_path):
    """Nothing on the path, or something else of that name."""
    if foreign is not None:
        (tmp_path / foreign).parent.mkdir(exist_ok=True)
        (tmp_path / foreign).touch()
    for name in [name for name in sys.modules if name.partition(".")[0] == "bench"]:
        monkeypatch.delitem(sys.modules, name)
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    assert main(["bench", "--case", "smoke"]) == 2
    message = capsys.readouterr().err
    assert "they are the folder bench of the repository" in message
    assert 'pip install -e ".[bench,peers]"' in message
    for name in [name for name in sys.modules if name.partition(".")[0] == "bench"]:
        monkeypatch.delitem(sys.modules, name)  # the foreign ones


def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["bench", "--case", "smoke.kl", "--device", "cpu", "--rounds", "1", "--peers", OURS]) == 2
    message = capsys.readouterr().err
    assert "tqdm is not installed" in message
    assert 'pip install -e ".[bench,peers]"' in message


def test_a_missing_module_of_the_repository_is_no_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bench.measuring.run", None)
    with pytest.raises(ModuleNotFoundError):
        main(["bench", "--case", "smoke.kl"])


def test_commands_are_listed_and_importable(capsys):
    """With a line for each in `--help`, which says more of each one."""
    assert one_line.main(["--help"]) == 0
    said = capsys.readouterr().out
    for name, (module, line) in one_line.COMMANDS.items():
        assert f"  {name} " in said
        assert line in said
        with pytest.raises(SystemExit) as end:
            one_line.main([name, "--help"])
        assert end.value.code == 0
        assert f"usage: python -m bench {name} " in capsys.readouterr().out
        assert module in sys.modules


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("scalin", "there is no command 'scalin'; did you mean scaling?"),
        ("tensor_paralel", "did you mean tensor-parallel?"),
        ("xyzzy", "there is no command 'xyzzy'; --help lists them"),
    ],
)
def test_an_unknown_command_is_an_error_of_one_line(name, said, capsys):
    with pytest.raises(CommandError, match=re.escape(said)):
        one_line.main([name])
    assert main(["bench", name]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("words", [["run"], []])
def test_without_a_command_word_cases_are_run(words, capsys):
    """The spelling of before there were commands."""
    options = ["--case", "smoke.scoring", "--device", "cpu", "--rounds", "1", "--peers", OURS]
    assert one_line.main([*words, *options]) == 0
    assert f"| none | {OURS} |" in capsys.readouterr().out
