"""`python -m bench preparation`: how long `unisd prepare` takes for many rows, and how much memory.

Of FILE, or of `--rows` synthetic questions, all different. By default contexts by retrieval and no negatives: what no
model has to write. Each is a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.parser import command_parser
from bench.records import results_file
from bench.records.environment import environment
from unisd.models import SMOLLM2
from unisd.prepare.settings import CONTEXTS

SUBJECTS = ("river", "bridge", "engine", "orchard", "library", "harbour", "teacher", "battery", "forest", "market")
ASKED = ("weight", "age", "height", "colour", "price", "speed", "owner", "origin", "purpose", "name")
PLACES = ("north", "south", "east", "west", "hill", "coast", "valley", "city", "island", "plain")


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("preparation", __doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--rows", type=int, nargs="*", default=[], help="numbers of synthetic rows")
    parser.add_argument("--contexts", choices=CONTEXTS, default="retrieval")
    parser.add_argument("--model", default=SMOLLM2, help="whose tokenizer measures the lengths")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(list(arguments))
    if not options.files and not options.rows:
        parser.error("give files, or --rows with numbers")
    result: dict[str, Any] = {
        "environment": environment(torch.device("cpu")),
        "options": {name: str(value) for name, value in vars(options).items() if name != "files"},
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for count in options.rows:
            file = Path(folder) / f"synthetic_{count}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in synthetic(count)), encoding="utf-8")
            options.files.append(file)
        for file in options.files:
            run = prepared(file, options.contexts, options.model, Path(folder) / "prepared")
            print(run, flush=True)
            result["runs"].append(run)
            if options.output:
                results_file.write_json(options.output, result)
    return 0


def synthetic(count: int) -> list[dict[str, str]]:
    """Questions and answers of a sentence each, no two alike."""
    draw = random.Random(0)
    rows = []
    for number in range(count):
        subject, asked, place = draw.choice(SUBJECTS), draw.choice(ASKED), draw.choice(PLACES)
        other = draw.choice(SUBJECTS)
        question = f"What is the {asked} of {subject} number {number} in the {place}, next to the {other}?"
        rows.append({"question": question, "answer": f"The {asked} of that {subject} is {draw.randrange(1000)}."})
    return rows


def prepared(file: Path, contexts: str, model: str, folder: Path) -> dict[str, Any]:
    """Seconds of the whole command and of its parts, and its peak memory.

    Raises:
        RuntimeError: the command failed.
    """
    command = [sys.executable, "-m", "unisd", "prepare", str(file), "-o", str(folder), "--overwrite"]
    command += ["--contexts", contexts, "--negatives", "none", "--model", model]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"unisd prepare {file.name} failed: {done.stderr.strip().splitlines()[-1]}")
    report = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))["report"]
    kept = {name: report[name] for name in ("read", "kept", "contexts", "seconds", "peak_memory_gib")}
    return {"file": file.name, "command_seconds": round(time.perf_counter() - started, 1), **kept}
