"""Starts a run on two processes in each way that docs/distributed.md types, on the processor; looks at what it left.

    python scripts/deepspeed_runs.py FOLDER [NAME ...]

Each is a run of four steps of a model of some ten thousand weights, with a checkpoint after two, and of six when it is
resumed. Prints a line for each; its output is in FOLDER/NAME.log.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import accelerate
import torch
import transformers
import yaml

from tests.trainer import tiny_run

UNISD = [sys.executable, "-m", "unisd"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TRAIN = ["train", "--config", "run.yaml"]
RUNS = {
    **{f"unisd-{e}": [*UNISD, "launch", e, "--num_processes", "2", *TRAIN] for e in ("ddp", "fsdp2", "zero2", "zero3")},
    **{
        f"accelerate-{engine}": [
            *ACCELERATE,
            *("--config_file", f"{engine}.yaml", "--num_processes", "2", "-m", "unisd"),
            *TRAIN,
        ]
        for engine in ("ddp", "fsdp2", "zero2", "zero3")
    },
    "torchrun-ddp": [*TORCHRUN, "--nproc-per-node", "2", "-m", "unisd", *TRAIN],
    "torchrun-fsdp2": [*TORCHRUN, "--nproc-per-node", "2", "-m", "unisd", "train", "--config", "fsdp.yaml"],
}
LEFT = {
    "ddp": "optimizer.pt",
    "fsdp2": "pytorch_model_fsdp*",  # in shards, or whole: "torchrun" by default
    "zero2": "global_step2/*zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "zero3": "global_step2/zero_pp_rank_1_mp_rank_00_model_states.pt",
}
"""File of a checkpoint that no other engine writes."""


def prepare(folder: Path) -> None:
    tiny_run.llama().save_pretrained(folder / "model")
    tiny_run.tokenizer().save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_run.rows(count=8)))
    settings = {
        "model_name_or_path": "model",
        "dataset": "rows.jsonl",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 6,
        "prompt_frame": "given",
        "save_strategy": "steps",
        "save_steps": 2,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    (folder / "fsdp.yaml").write_text(yaml.safe_dump({**settings, "fsdp": True}))
    for engine in LEFT:
        printed = subprocess.run([*UNISD, "launch", engine, "--print"], check=True, capture_output=True, text=True)
        (folder / f"{engine}.yaml").write_text(printed.stdout)


def start(folder: Path, name: str, *more: str) -> int:
    """Optimizer steps that were made."""
    with (folder / f"{name}.log").open("a") as log:
        command = [*RUNS[name], "--output_dir", name, *more]
        subprocess.run(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, check=True)
    return int(json.loads((folder / name / "trainer_state.json").read_text())["global_step"])


def main(folder: Path, names: list[str]) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, accelerate)}
    print(", ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
    failed = 0
    for name in names or RUNS:
        (folder / f"{name}.log").unlink(missing_ok=True)
        began = time.monotonic()
        try:
            steps = start(folder, name, "--max_steps", "4"), start(folder, name, "--max_steps", "6", "--resume")
            is_engine = any((folder / name / "checkpoint-2").glob(LEFT[name.rpartition("-")[2]]))
            good = steps == (4, 6) and is_engine
        except subprocess.CalledProcessError as error:
            good, steps = False, (f"exit status {error.returncode}",)
        failed += not good
        print(f"{name:18s} {'ok' if good else 'FAILED'} {steps} {time.monotonic() - began:.0f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
