"""The end of `unisd train`: what it says, commands that work, and the push to the hub after the last save."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from unisd.cli import main
from unisd.run import hub

pytestmark = pytest.mark.filterwarnings("ignore")


def commands(said: str) -> dict[str, list[str]]:
    """The commands that `unisd train` names next."""
    lines = said.split("\nnext\n")[1].splitlines()
    named = (line.strip().split("  ", 1) for line in lines if line.startswith("  "))
    return {name: shlex.split(text.strip()) for name, text in named if text.strip().startswith("unisd ")}


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_what_it_says_next_works(run_flags: list[str], tmp_path: Path, kind: str, capsys, monkeypatch):
    rows = tmp_path / "my rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"what is {i}?", "answer": f"it is {i}"}) + "\n" for i in range(4)))
    given = dict(zip(run_flags[::2], run_flags[1::2], strict=True))
    given = {name: value for name, value in given.items() if not name.startswith(("--procedural", "--lora"))}
    given |= {"--dataset": str(rows), "--preset": "ema", "--drift_probe_every": "1", "--max_steps": "2"}
    given |= {"--output_dir": str(tmp_path / "a run"), "--logging_steps": "1", "--eval_file": str(rows)}
    given |= {"--report_to": "tensorboard", "--log_completions": "true"} if kind == "adapter" else {}
    given["--use_peft"] = str(kind == "adapter").lower()
    assert main(["train", *(word for pair in given.items() for word in pair)]) == 0
    said = capsys.readouterr().out
    run = tmp_path / "a run"
    for text in ("ema: the teacher's weights", "loss ", " -> ", "eval loss", "drift", f"{kind} ", "README.md"):
        assert text in said
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [2]
    if kind == "adapter":
        assert list((run / "completions").glob("*.parquet"))
        assert list((run / "runs").rglob("events.out.tfevents*"))
    monkeypatch.chdir(tmp_path)  # where the page is written
    next_commands = commands(said)
    # No evaluation knows these rows.
    assert next_commands.keys() == {"drift", "page", "teacher", "look"} | ({"merge"} if kind == "adapter" else set())
    # The completions of a model this small never end.
    short = {"drift": ["--max_new_tokens", "4"]}
    for name, command in next_commands.items():
        assert main([*command[1:], *short.get(name, [])]) == 0, name
    assert (tmp_path / "a run-teacher/config.json").is_file() == (kind == "model")


class Hub:
    """What of the hub's client a run calls."""

    uploads: list[dict] = []  # noqa: RUF012
    error: Exception | None = None

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, name, **options):
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, **options):
        Hub.uploads.append({**options, "files": sorted(os.listdir(options["folder_path"]))})
        if Hub.error is not None:
            raise Hub.error
        return SimpleNamespace(commit_url="https://hub/commit/1")


@pytest.fixture
def the_hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(hub, "HfApi", Hub)
    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    monkeypatch.setenv("HF_TOKEN", "none")
    Hub.uploads, Hub.error = [], None
    return Hub


def test_a_run_is_pushed_once_after_the_last_save(run_flags, the_hub, tmp_path: Path, capsys):
    assert main(["train", *run_flags, "--push_to_hub", "--hub_token", "secret", "--hub_strategy", "end"]) == 0
    (upload,) = the_hub.uploads
    assert upload["repo_id"] == "me/run"
    assert {"adapter_model.safetensors", "README.md", "unisd_config.yaml", "tokenizer.json"} <= set(upload["files"])
    assert {"checkpoint-*", "training_args.bin", "completions/*"} <= set(upload["ignore_patterns"])
    assert capsys.readouterr().out.rstrip().endswith("pushed to https://hub/commit/1")
    # transformers pickles the settings into every checkpoint.
    assert os.environ["HF_TOKEN"] == "secret"
    assert b"secret" not in (tmp_path / "run/training_args.bin").read_bytes()


def test_a_push_that_fails_says_where_the_run_is(run_flags, the_hub, tmp_path: Path, capsys):
    the_hub.error = OSError("no route to the hub")
    assert main(["train", *run_flags, "--push_to_hub", "--hub_strategy", "end"]) == 2
    out, err = capsys.readouterr()
    assert "where things are" in out  # the run's own report is not lost either
    assert f"the run is saved in {tmp_path / 'run'}, but it could not be pushed (OSError: no route to the hub)" in err
    assert (tmp_path / "run/adapter_model.safetensors").is_file()
    assert (tmp_path / "run/README.md").is_file()


def test_a_hub_that_cannot_be_reached_is_told_before_training(run_flags, tmp_path: Path, capsys):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert main(["train", *run_flags, "--push_to_hub"]) == 2
    assert "Cannot reach" in capsys.readouterr().err
    assert not (tmp_path / "run/adapter_model.safetensors").exists()


def test_a_tracker_that_is_not_installed_is_told_before_training(run_flags, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("unisd.cli.checks.get_available_reporting_integrations", list)
    assert main(["train", *run_flags, "--report_to", "trackio"]) == 2
    assert "report_to=trackio needs a package that is not installed: pip install trackio" in capsys.readouterr().err
