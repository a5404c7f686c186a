"""`python -m bench recipes FILE ...`: every recipe on real rows, from the file to the falling loss, as a user types it.

Each file is prepared by `unisd prepare` with every kind of context and with negatives by the model itself; then
`unisd train` runs each preset on it for some steps, with LoRA and with all weights. What it reports: rows kept and
dropped, negatives asked for, valid and rejected with reasons, losses and the drift. Figures are of this machine; losses
over so few steps say that a recipe trains, not how well.
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
from unisd.drift.schedule import NAME as DRIFT
from unisd.models import SMOLLM2
from unisd.prepare.settings import CONTEXTS, NEGATIVES
from unisd.presets import PRESETS, is_paper


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("recipes", __doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--limit", type=int, default=24, help="rows of each file")
    parser.add_argument("--contexts", nargs="*", choices=CONTEXTS, default=list(CONTEXTS))
    parser.add_argument("--negatives", choices=NEGATIVES, default="model", help="of the preparations")
    parser.add_argument("--presets", nargs="*", choices=list(PRESETS), default=[n for n in PRESETS if not is_paper(n)])
    parser.add_argument("--modes", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin nothing new after so long")
    parser.add_argument("--work", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(list(arguments))
    ends = time.monotonic() + 60 * options.minutes
    result: dict[str, Any] = {
        "environment": environment(torch.device("cpu")),
        "options": {name: str(value) for name, value in vars(options).items() if name != "files"},
        "prepared": [],
        "trained": [],
        "left_out": [],
    }
    for file in options.files:
        for contexts in options.contexts:
            if time.monotonic() > ends:
                result["left_out"].append(f"prepare {file.name} {contexts}")
                continue
            result["prepared"].append(_say(prepared(file, contexts, options)))
            _save(result, options.output)
    for file in options.files:
        folder = options.work / f"{file.stem}-{options.contexts[0]}" if options.contexts else file
        for preset in options.presets:
            for mode in options.modes:
                if time.monotonic() > ends:
                    result["left_out"].append(f"train {file.name} {preset} {mode}")
                    continue
                result["trained"].append(_say(trained(folder, preset, mode, options)))
                _save(result, options.output)
    for left in result["left_out"]:
        print(f"no time left: {left}")
    return 0


def prepared(file: Path, contexts: str, options: Any) -> dict[str, Any]:
    """One preparation: its report, or what it said as it failed."""
    folder = options.work / f"{file.stem}-{contexts}"
    done, seconds = _unisd(
        *("prepare", file, "-o", folder, "--overwrite", "--contexts", contexts, "--limit", options.limit),
        *("--model", options.model, "--negatives", options.negatives),
    )
    row: dict[str, Any] = {"file": file.name, "contexts": contexts, "seconds": round(seconds, 1)}
    if done.returncode:
        return {**row, "failure": done.stderr.strip().splitlines()[-1]}
    return {**row, **json.loads((folder / "prepared.json").read_text())["report"]}


def trained(rows: Path, preset: str, mode: str, options: Any) -> dict[str, Any]:
    """One run: its first and last loss and the drift, or what it said as it failed."""
    folder = options.work / f"{preset}-{mode}"
    done, seconds = _unisd(
        *("train", "--dataset", rows, "--preset", preset, "--output_dir", folder, "--overwrite_output_dir"),
        *("--model_name_or_path", options.model, "--per_device_train_batch_size", options.batch_size),
        *("--gradient_accumulation_steps", 1, "--max_steps", options.steps, "--logging_steps", 1),
        *("--max_completion_length", options.new_tokens, "--report_to", "none", "--bf16", "false"),
        *("--gradient_checkpointing", "false", "--disable_tqdm", "true", "--save_strategy", "no"),
        *("--drift_probe_every", 1000, "--learning_rate", 1e-3 if mode == "lora" else 1e-5),
        *("--use_peft", "true" if mode == "lora" else "false"),
    )
    row: dict[str, Any] = {"rows": rows.name, "preset": preset, "mode": mode, "seconds": round(seconds, 1)}
    if done.returncode:
        return {**row, "failure": (done.stderr.strip().splitlines() or ["it said nothing"])[-1]}
    return {**row, **logged(folder)}


def logged(folder: Path) -> dict[str, Any]:
    """Losses of a run's log, the means of their first and last quarter, and the last drift."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    drifts = [entry[DRIFT] for entry in history if DRIFT in entry]
    quarter = max(1, len(losses) // 4)
    return {
        "first_loss": sum(losses[:quarter]) / quarter,
        "last_loss": sum(losses[-quarter:]) / quarter,
        "losses": losses,
        "drift": drifts[-1] if drifts else None,
    }


def _unisd(*words: Any) -> tuple[subprocess.CompletedProcess[str], float]:
    started = time.perf_counter()
    command = [sys.executable, "-m", "unisd", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done, time.perf_counter() - started


def _say(row: dict[str, Any]) -> dict[str, Any]:
    print({name: value for name, value in row.items() if name != "losses"}, flush=True)
    return row


def _save(result: dict[str, Any], file: Path | None) -> None:
    if file is not None:
        results_file.write_json(file, result)
