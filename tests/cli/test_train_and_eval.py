"""`unisd train` from a YAML file, and `unisd eval` on what it saved: a tiny random model, the real commands."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import distributed

from unisd.cli import main
from unisd.cli import train as train_command
from unisd.cli.errors import CommandError
from unisd.cli.train import build, parse


def write_config(path: Path, base: Path) -> Path:
    config = path / "run.yaml"
    config.write_text(
        f"""
model_name_or_path: {base}
dataset: procedural
procedural_rows: 8
procedural_steps: [1]
preset: contrastive
output_dir: {path / "run"}
max_steps: 2
per_device_train_batch_size: 2
gradient_accumulation_steps: 1
max_completion_length: 8
learning_rate: 0.5
bf16: false
use_cpu: true
gradient_checkpointing: false
report_to: none
save_steps: 1
lora_r: 2
drift_probe_every: 0
logging_steps: 1
"""
    )
    return config


@pytest.mark.filterwarnings("ignore")
def test_train_then_eval(tmp_path: Path, base: Path, capsys):
    config = write_config(tmp_path, base)
    # The command line beats the file.
    assert main(["train", "--config", str(config), "--learning_rate", "0.01", "--preset", "plain"]) == 0
    saved = tmp_path / "run"
    assert f"unisd eval procedural --model {saved}" in capsys.readouterr().out
    state = json.loads((saved / "checkpoint-2" / "trainer_state.json").read_text())
    assert max(entry.get("learning_rate", 0.0) for entry in state["log_history"]) <= 0.01
    weights = load_file(saved / "adapter_model.safetensors")
    trained = [weight for name, weight in weights.items() if "lora_B" in name]
    assert trained
    assert any(weight.abs().max() > 0 for weight in trained)

    output = tmp_path / "scores.json"
    command = ["eval", "procedural", "--model", str(saved), "--count", "2", "--steps", "1", "--output", str(output)]
    assert main(command) == 0
    assert json.loads(output.read_text())["overall"]["count"] == 2
    assert "perplexity" in capsys.readouterr().out
    assert main(["eval", "retention", "--model", str(saved)]) == 0
    assert "KL(base || trained)" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_an_output_folder_is_written_over_only_if_asked(tmp_path: Path, base: Path, capsys):
    config = str(write_config(tmp_path, base))
    run = tmp_path / "run"
    assert main(["train", "--config", config, "--resume"]) == 2
    assert "there is no checkpoint in output_dir" in capsys.readouterr().err
    assert main(["train", "--config", config, "--max_steps", "1"]) == 0
    adapter = (run / "adapter_model.safetensors").read_bytes()

    capsys.readouterr()
    assert main(["train", "--config", config]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "is not empty (it holds 1 checkpoints): give --resume" in said
    assert main(["train", "--config", config, "--resume", "--overwrite_output_dir"]) == 2
    assert (run / "adapter_model.safetensors").read_bytes() == adapter

    assert main(["train", "--config", config, "--resume"]) == 0
    history = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]

    # The second checkpoint of the earlier run would be the newest one at the next --resume, and its scores this one's.
    (run / "eval").mkdir()
    (run / "eval" / "cos_e.json").write_text("{}")
    (run / "sweep.json").write_text("{}")
    capsys.readouterr()
    assert main(["train", "--config", config, "--overwrite_output_dir", "--max_steps", "1"]) == 0
    assert f"deleting {run / 'eval'}, of the run that is overwritten" in capsys.readouterr().err
    assert not any((run / name).exists() for name in ("checkpoint-2", "eval", "sweep.json"))
    assert (run / "checkpoint-1").exists()
    assert json.loads((run / "trainer_state.json").read_text())["global_step"] == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "extra", [[], ["--preset", "clip", "--ema", "none", "--lora_target_modules", "q_proj", "v_proj"]]
)
def test_the_settings_in_the_run_folder_are_those_of_the_run(run_flags: list[str], extra: list[str], tmp_path: Path):
    """`unisd train --config RUN/unisd_config.yaml` resolves to the same run."""
    extra = [*extra, "--lr_scheduler_kwargs", '{"num_cycles": 0.5}', "--hub_token", "secret", "--push_to_hub"]
    first = parse([*run_flags, *extra])
    first.config.push_to_hub = False  # this machine reaches no hub
    trainer = build(first)
    trainer.train()
    file = tmp_path / "run" / "unisd_config.yaml"
    assert "secret" not in file.read_text()

    second = parse(["--config", str(file)])
    for part in ("data", "model", "run"):
        assert getattr(second, part) == getattr(parse([*run_flags, *extra]), part)
    again, asked = vars(second.config), vars(parse([*run_flags, *extra, "--no_push_to_hub"][:-1]).config)
    left_out = {"hub_token", "push_to_hub", "distributed_state", "_n_gpu", "deepspeed_plugin", "accelerator_config"}
    for name in asked.keys() - left_out:
        assert again[name] == asked[name], name
    assert again["accelerator_config"].to_dict() == asked["accelerator_config"].to_dict()


ROWS = [{"prompt": f"what is {i}", "teacher_prompt": f"what is {i}? it is {i}"} for i in range(4)]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    written = {}
    for name, start in (("train", 0), ("other", 2)):
        written[name] = tmp_path / f"{name}.jsonl"
        written[name].write_text("".join(json.dumps(row) + "\n" for row in ROWS[start : start + 2]))
    return written


@pytest.mark.filterwarnings("ignore")
def test_evaluation_is_on_the_file_that_was_named(run_flags: list[str], files: dict[str, Path], capsys):
    rows = ["--dataset", str(files["train"])]
    flags = [word for word in run_flags if not word.startswith("--procedural")]
    del flags[flags.index("4") : flags.index("4") + 1], flags[flags.index("1") : flags.index("1") + 1]
    settings = parse([*flags, *rows, "--eval_file", str(files["other"])])
    trainer = build(settings)
    assert trainer.train_dataset["prompt"] == [row["prompt"] for row in ROWS[:2]]
    assert trainer.eval_dataset["prompt"] == [row["prompt"] for row in ROWS[2:]]

    assert main(["train", *flags, *rows, "--eval_split", "validation"]) == 2
    assert "has no splits; give the rows to evaluate on as --eval_file FILE" in capsys.readouterr().err
    assert main(["train", *flags, *rows, "--train_split", "validation"]) == 2
    assert "a file has no splits" in capsys.readouterr().err
    assert main(["train", *flags, *rows, "--eval_strategy", "steps"]) == 2
    assert "needs rows to evaluate on" in capsys.readouterr().err
    # Without a strategy the rows are evaluated on once, after training.
    assert main(["train", *flags, *rows, "--eval_file", str(files["other"])]) == 0
    assert "eval_loss" in capsys.readouterr().out


def test_the_process_group_ends_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By an error too: threads of a group that is left alone can abort the process at its exit."""

    def fails(settings):
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        raise CommandError("cannot be built")

    monkeypatch.setattr(train_command, "build", fails)
    assert main(["train", "--output_dir", str(tmp_path / "run")]) == 2
    assert not distributed.is_initialized()


def test_a_split_of_the_hub_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch):
    from unisd.cli import data

    asked = []
    rows = Dataset.from_list([{"prompt": "a", "teacher_prompt": "b"}])
    monkeypatch.setattr("datasets.load_dataset", lambda *names, split: asked.append((*names, split)) or rows)
    flags = ["--dataset", "someone/rows", "--dataset_config", "small", "--train_split", "a", "--eval_split", "b"]
    settings = parse(flags)
    data.training_rows(settings.data, settings.config, "model")
    data.evaluation_rows(settings.data, settings.config, "model")
    assert asked == [("someone/rows", "small", "a"), ("someone/rows", "small", "b")]


def test_a_packed_file_is_read_as_by_prepare(tmp_path: Path):
    from unisd.cli import data

    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"prompt": "a", "teacher_prompt": "b"}\n'))
    settings = parse(["--dataset", str(file)])
    assert data.training_rows(settings.data, settings.config, "model")[0] == {"prompt": "a", "teacher_prompt": "b"}


def test_eval_loads_as_asked(base: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    from unisd.cli import evaluate

    seen = []

    def look(model, tokenizer, rows, **options):
        seen.append((model.dtype, model.device, model.config._attn_implementation))
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate_procedural", look)
    command = ["eval", "procedural", "--model", str(base)]
    assert main([*command, "--dtype", "bfloat16", "--attn_implementation", "eager", "--device", "cpu"]) == 130
    assert seen.pop() == (torch.bfloat16, torch.device("cpu"), "eager")
    if not torch.cuda.is_available():
        assert main(command) == 130
        assert seen.pop() == (torch.float32, torch.device("cpu"), "sdpa")
        assert main([*command, "--device", "cuda"]) == 2
        assert "there is no such device here" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_eval_in_bfloat16_gives_scores(base: Path, tmp_path: Path):
    output = tmp_path / "scores.json"
    command = ["eval", "procedural", "--model", str(base), "--count", "2", "--steps", "1", "--no-accuracy"]
    perplexities = []
    for dtype in ("float32", "bfloat16"):
        assert main([*command, "--dtype", dtype, "--output", str(output)]) == 0
        perplexities.append(json.loads(output.read_text())["overall"]["perplexity"])
    assert perplexities[1] == pytest.approx(perplexities[0], rel=0.05)


def test_the_documented_file_is_valid():
    path = Path(__file__).parents[2] / "docs" / "run.yaml"
    settings = parse(["--config", str(path), "--use_cpu", "true"])
    config = settings.config
    assert settings.data.procedural_steps == [1, 2, 3]
    assert (config.preset, config.agreement_fraction, config.contrastive_weight) == ("unisd_star", 0.5, 0.01)
    assert (settings.model.lora_r, settings.model.use_peft) == (16, True)


@pytest.mark.exhaustive
def test_accelerate_launches_two_processes(run_flags: list[str], tmp_path: Path):
    """`accelerate launch -m unisd train` on two CPU processes: both take their share, one writes."""
    # With --cpu accelerate starts one process, whatever the number; the run asks for the CPU itself.
    launcher = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no"
    options = [*launcher.split(), "--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "unisd", "train", *run_flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def launch() -> subprocess.CompletedProcess[str]:
        # Half a minute of CPU time; the limit is for what hangs, not for a machine that is busy.
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)

    done = launch()
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("where things are") == 1
    run = tmp_path / "run"
    assert (run / "adapter_model.safetensors").is_file()
    assert "1 optimizer steps" in (run / "README.md").read_text()
    # Two rows a process and step, of four.
    assert json.loads((run / "trainer_state.json").read_text())["epoch"] == 1.0
    again = launch()
    assert again.returncode != 0
    assert "is not empty" in again.stderr
