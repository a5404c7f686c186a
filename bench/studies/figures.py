"""`python -m bench figures`: every figure of a CPU in docs/benchmarks.md and README.md, measured anew on this machine.

Each part is a command of its own, in a process of its own, whose result goes into a folder of `bench/results` named
after the processor. Before it begins it says how long it will take: as long as the same command took here the last
time, else as long as two cores of a server's processor take. Afterwards the plots and pages are written. `--list`
prints the parts and runs nothing; `--only` runs some.

    python -m bench figures              # the operations: what a kernel costs
    python -m bench figures --steps      # whole training steps with every preset, which take twice as long

A part that fails is said, and the others go on; exit status 1.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.parser import command_parser
from bench.peers import OURS, PEAK
from bench.records import machine, results_file
from bench.records.environment import environment
from bench.records.machine import multiplies_bfloat16
from bench.report.pages import RESULTS, ROOT
from unisd.gemma3 import GEMMA3
from unisd.models import SMOLLM2, is_fetched

TIMES = "minutes"
ROUNDS = ("--rounds", "5", "--peer-rounds", "2")
# What the result of a model's hidden states and a sweep compare with; the whole list is in the first two parts.
FEW_PEERS = (OURS, PEAK, "dense float32", "dense float32 compiled")


@dataclass(frozen=True)
class Part:
    """One result file.

    Attributes:
        name: of the file.
        minutes: on two quiet cores of an AMD EPYC with AVX512_BF16, estimated before the first run: of the steps from a
            run of four presets there (4.4 and 6.1 minutes, of which a preset's memory took half).
        words: of the command, after `python -m bench`.
    """

    name: str
    minutes: float
    words: tuple[str, ...]


def _cases(*names: str) -> tuple[str, ...]:
    return ("run", "--device", "cpu", "--case", *names)


OPERATIONS = (
    Part("float32", 5, (*_cases("scoring_cpu", "kl_cpu", "kl_trainable_cpu", "unisd_star_cpu"), *ROUNDS)),
    Part("bfloat16", 4.5, (*_cases("scoring_cpu_bf16", "kl_cpu_bf16", "unisd_star_cpu_bf16"), *ROUNDS)),
    Part("smollm2", 1.5, (*_cases("unisd_star_smollm2"), *ROUNDS, "--peers", *FEW_PEERS)),
    Part(
        "heads",
        1.5,
        (
            *_cases("qwen2.5-0.5b_cpu", "gemma3-270m_cpu", "gemma3-270m_cpu_bf16"),
            *("--rounds", "3", "--peers", OURS, PEAK),
        ),
    ),
    Part("scaling", 3, ("scaling", "--device", "cpu", "--peers", OURS, "dense float32")),
    Part("threads", 3.5, ("threads", "--rounds", "3")),
    Part("ceilings", 0.3, ("ceilings", "--device", "cpu")),
    Part("mixtures", 1.5, ("mixtures",)),
    Part("ema", 0.5, ("ema",)),
    Part("numerics", 0.3, ("numerics",)),
)
STEPS = tuple(
    Part(
        f"steps_{short}",
        minutes,
        ("steps", "--device", "cpu", "--dtype", "auto", "--model", model, "--rounds", "3"),
    )
    for short, model, minutes in (("smollm2", SMOLLM2, 16), ("gemma3", GEMMA3, 22))
)


def folder_here() -> Path:
    """The folder of this machine's results."""
    about = machine.processor()
    level = torch.backends.cpu.get_cpu_capability()
    return RESULTS / machine.slug({"cpu": about["name"], "processor": about, "instruction_set": level})


def minutes_of(parts: Sequence[Part], folder: Path) -> dict[str, float]:
    """What each part took here the last time, if its result there is of the same command; else what is expected."""
    path = folder / f"{TIMES}.json"
    taken = results_file.read(path)["minutes"] if path.exists() else {}
    return {
        part.name: taken[part.name] if part.name in taken and _is_of(part, folder) else part.minutes for part in parts
    }


def _is_of(part: Part, folder: Path) -> bool:
    """Whether the part's result in a folder was made by its command as it is now."""
    path = folder / f"{part.name}.json"
    said = results_file.read(path)["environment"].get("command", "") if path.exists() else ""
    return said.startswith(shlex.join(["python", "-m", "bench", *part.words, "--output"]))


def plan(parts: Sequence[Part], minutes: dict[str, float], folder: Path) -> str:
    """What will be done, and how long it takes."""
    lines = [
        f"  {part.name:<16}{minutes[part.name]:5.1f} min   python -m bench {' '.join(part.words)}" for part in parts
    ]
    return "\n".join([f"{sum(minutes.values()):.0f} minutes into {folder}", *lines])


def run(parts: Sequence[Part], folder: Path) -> list[str]:
    """Measure every part; names of those that failed."""
    minutes = minutes_of(parts, folder)
    total, begun, failed = sum(minutes.values()), time.perf_counter(), []
    for number, part in enumerate(parts, 1):
        passed = (time.perf_counter() - begun) / 60
        print(
            f"[{number}/{len(parts)}] {part.name}: about {minutes[part.name]:.1f} minutes; {passed:.1f} of about "
            f"{total:.0f} have passed",
            flush=True,
        )
        output = folder / f"{part.name}.json"
        before = output.stat().st_mtime_ns if output.exists() else None
        since = time.perf_counter()
        command = [sys.executable, "-m", "bench", *part.words, "--output", str(output.relative_to(ROOT))]
        status = _status(command)
        written = output.exists() and output.stat().st_mtime_ns != before
        if status != 0:
            failed.append(f"{part.name}: status {status}{'' if written else ', nothing written'}")
        if written:
            _remember(folder, part.name, (time.perf_counter() - since) / 60)
    return failed


def _status(command: list[str]) -> int:
    """Exit status of a process in the repository."""
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def _remember(folder: Path, name: str, minutes: float) -> None:
    path = folder / f"{TIMES}.json"
    taken: dict[str, Any] = results_file.read(path)["minutes"] if path.exists() else {}
    taken[name] = round(minutes, 2)
    results_file.write_json(path, {"environment": environment(torch.device("cpu")), "minutes": taken})


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("figures", __doc__)
    names = [part.name for part in (*OPERATIONS, *STEPS)]
    parser.add_argument("--steps", action="store_true", help="whole training steps in place of the operations")
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=f"some of: {', '.join(names)}")
    parser.add_argument("--list", action="store_true", help="print what would be done, and how long it takes")
    options = parser.parse_args(arguments)
    parts = [
        part
        for part in ((*OPERATIONS, *STEPS) if options.only else STEPS if options.steps else OPERATIONS)
        if not options.only or part.name in options.only
    ]
    folder = folder_here()
    absent = [part.name for part in parts if not _can_be_measured(part)]
    parts = [part for part in parts if part.name not in absent]
    print(plan(parts, minutes_of(parts, folder), folder.relative_to(ROOT)), flush=True)
    for name in absent:
        print(f"{name}: left out: {'no units for bfloat16' if name == 'bfloat16' else 'its model is not in the cache'}")
    if options.list:
        return 0
    failed = run(parts, folder)
    status = _status([sys.executable, "-m", "bench", "report", "--plots"])
    for line in failed:
        print(f"failed: {line}")
    return int(bool(failed) or status != 0)


def _can_be_measured(part: Part) -> bool:
    if part.name == "bfloat16":
        return multiplies_bfloat16()
    wanted = {"smollm2": SMOLLM2, "steps_smollm2": SMOLLM2, "steps_gemma3": GEMMA3}.get(part.name)
    return wanted is None or is_fetched(wanted)
