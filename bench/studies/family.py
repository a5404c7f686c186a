"""`python -m bench family --model NAME --train FILE --test FILE`: a model of another family, trained and evaluated.

    python -m bench family --model gemma3-270m --train cos_e_train.jsonl --test cos_e_validation.jsonl

As a user types it: `unisd eval` of the benchmark before, `unisd train` for some steps with LoRA, `unisd eval` after,
each in a process of its own. It shows that a family trains and evaluates, with the time and memory that takes; scores
after so few steps on so few questions do not say how well.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.parser import command_parser
from bench.records import results_file
from bench.records.environment import environment
from unisd.benchmarks import benchmarks
from unisd.cli.errors import CommandError
from unisd.compare import load_run
from unisd.gemma3 import GEMMA3
from unisd.presets import PRESETS


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("family", __doc__)
    parser.add_argument("--model", default=GEMMA3)
    parser.add_argument("--benchmark", choices=list(benchmarks()), default="cos_e")
    parser.add_argument("--train", type=Path, required=True, help="rows to train on, in the benchmark's format")
    parser.add_argument("--test", type=Path, required=True, help="rows to evaluate on, in the benchmark's format")
    parser.add_argument("--preset", choices=list(PRESETS), default="plain")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--limit", type=int, default=30, help="questions of each evaluation")
    parser.add_argument("--new_tokens", type=int, default=32, help="longest completion, of training and evaluation")
    parser.add_argument("--work", type=Path, default=Path("runs/family"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(list(arguments))
    shown = {name: value.name if isinstance(value, Path) else value for name, value in vars(options).items()}
    if Path(options.model).is_dir():
        shown["model"] = Path(options.model).name
    run = options.work / "trained"
    result = {
        "environment": environment(torch.device("cpu")),
        "options": {name: value for name, value in shown.items() if name not in ("work", "output")},
        "before": evaluated(options.model, options.work / "before", options),
        "trained": trained(run, options),
        "after": evaluated(str(run), run / "eval", options),
    }
    if options.output is not None:
        results_file.write_json(options.output, result)
    return 0


def evaluated(model: str, folder: Path, options: Any) -> dict[str, Any]:
    """Scores, time and memory of an evaluation."""
    likelihood = ("--likelihood",) if benchmarks()[options.benchmark].kind == "choice" else ()
    _unisd(
        *("eval", options.benchmark, "--data", options.test, "--model", model, "--limit", options.limit, *likelihood),
        *("--max_new_tokens", options.new_tokens, "-o", folder, "--device", "cpu"),
    )
    found = json.loads((folder / f"{options.benchmark}.json").read_text())
    versions = {name: found["environment"][name] for name in ("transformers", "torch", "peft", "CPU")}
    kept = {name: found[name] for name in ("decoding", "items", "scores", "seconds", "peak_memory_gib")}
    return _say({**kept, "versions": versions})


def trained(folder: Path, options: Any) -> dict[str, Any]:
    """Losses, drift, time and memory of a run."""
    started = time.perf_counter()
    _unisd(
        *("train", "--dataset", options.train, "--preset", options.preset, "--output_dir", folder),
        *("--overwrite_output_dir", "--model_name_or_path", options.model, "--use_peft", "true"),
        *("--max_steps", options.steps, "--per_device_train_batch_size", options.batch_size),
        *("--gradient_accumulation_steps", 1, "--max_completion_length", options.new_tokens, "--logging_steps", 1),
        *("--report_to", "none", "--bf16", "false", "--gradient_checkpointing", "false", "--disable_tqdm", "true"),
        *("--save_strategy", "no", "--use_cpu", "true"),
    )
    run = load_run(folder)
    return _say(
        {
            "losses": [loss for _, loss in run.curve("loss")],
            "gradient_norms": [norm for _, norm in run.curve("grad_norm")],
            "drift_nats_a_token": run.drift_kl,
            "train_seconds": run.seconds,
            "seconds": round(time.perf_counter() - started, 1),
            "peak_memory_gib": run.peak_memory,
        }
    )


def _unisd(*words: Any) -> None:
    command = [sys.executable, "-m", "unisd", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise CommandError(f"unisd {words[0]} failed: {said}")


def _say(row: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(row), flush=True)
    return row
