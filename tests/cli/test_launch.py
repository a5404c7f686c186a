"""`unisd launch`: configs that accelerate reads, and one message of a run of several processes that failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from tests.trainer import tiny_run
from unisd.cli import main
from unisd.cli.errors import CommandError, run
from unisd.cli.launch import _told
from unisd.launching import ENGINES, config_file
from unisd.run.failures import is_first_to_fail, is_lost_connection

ROOT = Path(__file__).parents[2]


def test_accelerate_reads_the_config_of_every_engine(capsys):
    assert main(["launch", "fsdp2", "--print"]) == 0
    assert capsys.readouterr().out == config_file("fsdp2").read_text()
    configs = {engine: load_config_from_file(str(config_file(engine))) for engine in ENGINES}
    types = {engine: config.distributed_type.value for engine, config in configs.items()}
    assert types == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert configs["fsdp2"].fsdp_config["fsdp_version"] == 2
    assert configs["fsdp2"].fsdp_config["fsdp_state_dict_type"] == "SHARDED_STATE_DICT"
    assert [configs[engine].deepspeed_config["zero_stage"] for engine in ("zero2", "zero3")] == [2, 3]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("fsdp train", "there is no engine 'fsdp'; did you mean fsdp2?; one of ddp, fsdp2, zero2, zero3"),
        ("ddp --num_processes 2", "name the command to start, for example: unisd launch fsdp2 train"),
        ("ddp train --config run.yaml", "there is no accelerator to count: give --num_processes N"),
    ],
)
def test_what_cannot_be_launched_is_said(capsys, monkeypatch, arguments, said):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert main(["launch", *arguments.split()]) == 2
    assert said in capsys.readouterr().err


@pytest.fixture
def processes(tmp_path, monkeypatch):
    """Become a process of a launcher, by its number."""

    def become(rank: int) -> None:
        folder = tmp_path / "attempt_0" / str(rank)
        folder.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        monkeypatch.setenv("WORLD_SIZE", "2")
        is_first_to_fail.cache_clear()

    yield become
    is_first_to_fail.cache_clear()


def refuse():
    raise CommandError("no such rows")


def lose():
    raise RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")


def test_one_of_several_processes_tells(capsys, processes):
    processes(1)
    assert is_first_to_fail()  # as the end of the process group asks, before the others notice
    assert run("unisd train", refuse, traceback=False) == 2
    assert capsys.readouterr().err == "unisd train: error: no such rows\n"
    processes(0)
    assert run("unisd train", refuse, traceback=False) == 1
    assert run("unisd train", lose, traceback=False) == 1
    assert capsys.readouterr().err == ""
    with pytest.raises(CommandError):
        run("unisd train", refuse, traceback=True)


def test_a_process_that_lost_another_says_so(capsys, processes):
    processes(0)
    assert run("unisd train", lose, traceback=False) == 1
    assert capsys.readouterr().err.count("another process of this run is gone") == 1
    assert not is_lost_connection(RuntimeError("shapes do not fit"))


def test_the_launcher_tells_of_a_process_that_was_killed(capsys):
    def failed(code):
        return SimpleNamespace(get_first_failure=lambda: (1, SimpleNamespace(exitcode=code)))

    assert _told(failed(2)) == 2
    assert capsys.readouterr().err == ""
    assert _told(failed(-signal.SIGKILL)) == 137
    assert "process 1 was ended by SIGKILL" in capsys.readouterr().err


def started(folder, *launcher: str, **settings) -> subprocess.CompletedProcess:
    tiny_run.llama().save_pretrained(folder / "model")
    tiny_run.tokenizer().save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_run.rows(count=8)))
    given = {
        "model_name_or_path": folder / "model",
        "dataset": folder / "rows.jsonl",
        "output_dir": folder / "out",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 6,
        "prompt_frame": "given",
        "save_strategy": "no",
        **settings,
    }
    flags = [argument for name, value in given.items() for argument in (f"--{name}", str(value))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", *launcher, "train", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.exhaustive
def test_a_run_is_launched_and_prints_once(tmp_path):
    done = started(tmp_path, "unisd", "launch", "fsdp2", "--num_processes", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("where things are") == 1
    assert done.stdout.count("'loss'") == 1
    assert (tmp_path / "out" / "unisd_ema_teacher" / ".metadata").is_file()  # FSDP2, not a silent DDP


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "launcher", ["unisd launch ddp --num_processes 2", "torch.distributed.run --nproc-per-node 2 -m unisd"]
)
def test_a_mistake_is_told_once(tmp_path, launcher):
    done = started(tmp_path, *launcher.split(), dataset=tmp_path / "nowhere.jsonl")
    assert done.returncode != 0
    assert done.stderr.count("unisd train: error: ") == 1
    if launcher.startswith("unisd"):
        assert "Traceback" not in done.stderr
        assert len([line for line in done.stderr.splitlines() if "error" in line.lower()]) == 1
