"""`python -m bench threads`: this package against the floor with few and many threads, on one core, and of few rows.

The settings are one thread, a thread for each core, two for each core (more than can run), and as many as cores on one
core alone. Each is a process of its own, whose threads and cores are set before anything is loaded. Then few rows N, as
one has without an accelerator, with a thread for each core. A ratio is to the floor of the same threads and rows in the
same round. In bfloat16 too where the processor multiplies it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case, shaped_case
from bench.parser import command_parser
from bench.peers import OURS, PEAK
from bench.records import results_file
from bench.records.environment import environment
from bench.records.machine import multiplies_bfloat16
from bench.records.verdict import Row, wrong
from bench.report.tables import ratio_cells, share_cell
from unisd.cli.errors import CommandError

# SmolLM2-135M's head, as in the cases of a CPU.
HIDDEN_SIZE, VOCAB_SIZE = 576, 49152
ROWS, FEW_ROWS = 256, (32, 64, 128, 256)
OPERATIONS = {"scoring": 0, "kl": 0, "unisd_star": 3}
SMALL_BAR = 1.3
COMPARED = (OURS, PEAK)
DENSE = "dense float32"
SAMPLE_SECONDS = 0.4


@dataclass(frozen=True)
class Setting:
    """Threads of a process on some of the cores it may use."""

    threads: int
    cores: int

    def __str__(self) -> str:
        return f"{_counted(self.threads, 'thread')} on {_counted(self.cores, 'core')}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def usable_cores() -> list[int]:
    if not hasattr(os, "sched_getaffinity"):
        raise CommandError("the cores of a process can be chosen under Linux only")
    return sorted(os.sched_getaffinity(0))


def settings(cores: int) -> list[Setting]:
    """Distinct ones, for a machine of so many cores."""
    wanted = [Setting(1, cores), Setting(cores, cores), Setting(2 * cores, cores), Setting(cores, 1)]
    return list(dict.fromkeys(wanted))


def cases(rows: Sequence[int], operations: Sequence[str]) -> list[Case]:
    dtypes = [torch.float32, *([torch.bfloat16] if multiplies_bfloat16() else [])]
    return [
        shaped_case(operation, count, HIDDEN_SIZE, VOCAB_SIZE, OPERATIONS[operation], dtype)
        for dtype in dtypes
        for operation in operations
        for count in rows
    ]


def measured(setting: Setting, cases: Sequence[Case], peers: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Rows of a process with these threads and cores, each with what they were."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "bench", "run", "--device", "cpu", "--rounds", str(rounds)]
        command += ["--threads", str(setting.threads), "--sample-seconds", str(SAMPLE_SECONDS), "--memory", "here"]
        command += ["--peers", *peers, "--output", str(output)]
        command += ["--case", *(case.name for case in cases)]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_"))}
        with on_cores(usable_cores()[: setting.cores]):
            done = subprocess.run(
                command,
                env={**inherited, "OMP_NUM_THREADS": str(setting.threads)},
                stdout=subprocess.DEVNULL,
                check=False,
            )
        if not output.exists():
            raise CommandError(f"{setting}: the measurement ended with status {done.returncode} and wrote nothing")
        result = json.loads(output.read_text())
    # What the process saw, not what it was told.
    about = result["environment"]
    seen = {"threads": about["threads"], "cores": about["processor"]["usable_cores"]}
    return [{**row, **seen} for row in result["rows"]]


@contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """This process, and those it starts, on these cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def table(result: Mapping[str, Any]) -> str:
    """Threads and cores, then few rows."""
    nodes = result["environment"]["processor"]["numa_nodes"]
    shape = f"N = {ROWS}, H = {HIDDEN_SIZE}, V = {VOCAB_SIZE}"
    parts = [
        f"{shape}; NUMA nodes of the machine: {nodes}; ratios to the floor of the same setting in the same round.",
        _lines("threads", result["threads"], lambda row: str(Setting(row["threads"], row["cores"]))),
        f"Few rows, {Setting(*result['small_setting'])}; the bar is {SMALL_BAR:g} of the floor:",
        _lines("N", result["small"], lambda row: str(row["num_rows"])),
    ]
    return "\n\n".join(parts)


def _lines(title: str, rows: Sequence[Row], name: Any) -> str:
    titles = [title, "operands", "operation", "peer", "time / floor", "p20 to p80", "of the FMA peak"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        if row["peer"] in (OURS, DENSE):
            operation = row["case"].split(".")[1]
            figures = [row["failure"], "", ""] if "failure" in row else [*ratio_cells(row), share_cell(row)]
            lines.append(f"| {' | '.join([name(row), row['dtype'], operation, row['peer'], *figures])} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("threads", __doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=list(FEW_ROWS), help="N of the second table")
    parser.add_argument("--output", type=Path, help="JSON file for everything, raw samples included")
    options = parser.parse_args(arguments)
    cores = len(usable_cores())
    result: dict[str, Any] = {"threads": [], "small": []}
    for setting in settings(cores):
        print(f"{setting} ...", file=sys.stderr, flush=True)
        result["threads"] += measured(setting, cases([ROWS], ("kl", "unisd_star")), COMPARED, options.rounds)
    every = Setting(cores, cores)
    print(f"N = {', '.join(map(str, options.rows))}, {every} ...", file=sys.stderr, flush=True)
    result["small"] = measured(every, cases(options.rows, tuple(OPERATIONS)), (*COMPARED, DENSE), options.rounds)
    for row in result["small"]:
        if row["peer"] == OURS:
            row["bar"] = SMALL_BAR
    result["small_setting"] = [every.threads, every.cores]
    result["environment"] = environment(torch.device("cpu"))
    print(f"{table(result)}\n\n{json.dumps(result['environment'])}")
    if options.output:
        results_file.write_json(options.output, result)
    errors = wrong([*result["threads"], *result["small"]])
    for line in errors:
        print(line)
    return int(bool(errors))
