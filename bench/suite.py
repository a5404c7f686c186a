"""`python -m bench.suite --suite gpu --deadline 240 --output FILE`: many cases in one process, most important first.

The file is written after every entry, so that a process that is ended loses one entry at most; entries that the
deadline left out are in it, with the reason. Tables: `python -m bench.tables FILE`.

Exit status: 0; 1 if the floor or this package's default has no time in an entry that was run to its end, or is wrong,
or an entry could not be prepared; 3 if a contender took the accelerator with it: run again with `--resume`, which goes
on after that entry.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import results_file
from bench.cases import ACCELERATOR_CASES, CASES, HEADLINE_ROWS, HEADLINE_SHAPE, Case
from bench.deadline import Deadline
from bench.environment import environment
from bench.measure import DeviceLost, failure_text, measure
from bench.peers import FLOOR, PEERS
from bench.tables import OUT_OF_TIME, left_out
from bench.verdict import wrong

DEVICE_LOST = 3
NOT_REACHED = "not reached before the deadline"
# torch.compile's time is not in its figures, but in the session's: it runs last, for these row counts of one head.
COMPILED_ROWS = (HEADLINE_ROWS, 2048)
COMPILED = tuple(name for name in PEERS if name.startswith("dense") and PEERS[name].compiles)


@dataclass(frozen=True)
class Entry:
    """One case with some contenders; the floor is always one of them."""

    case: Case
    peers: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.case.name}: {', '.join(self.peers)}"


def contenders(case: Case) -> tuple[str, ...]:
    """At N = 8192 of the headline's head everything that has the operation; elsewhere what fits the time."""
    offering = [name for name, peer in PEERS.items() if case.operation in peer.operations]
    if case.name.startswith("smoke"):
        return tuple(name for name in offering if not PEERS[name].compiles)
    skipped = set(COMPILED)
    if not case.name.startswith(HEADLINE_SHAPE):
        skipped |= {"unisd torch", "dense float32", "dense bfloat16", "liger chunked", "liger kl", "orda"}
    elif case.num_rows != HEADLINE_ROWS:
        skipped |= {"unisd torch", "dense bfloat16", "liger triton", "liger chunked", "liger kl", "orda"}
    return tuple(name for name in offering if name not in skipped)


def plan(suite: str) -> list[Entry]:
    if suite == "smoke":
        names = ("smoke.kl", "smoke.kl_trainable", "smoke", "smoke.scoring")
        return [Entry(CASES[name], contenders(CASES[name])) for name in names]
    entries = [Entry(case, contenders(case)) for case in ACCELERATOR_CASES]
    for case in ACCELERATOR_CASES:
        if case.name.startswith(HEADLINE_SHAPE) and case.num_rows in COMPILED_ROWS:
            entries.append(Entry(case, (FLOOR, *COMPILED)))
    return entries


SUITES = ("gpu", "smoke")


def run(
    entries: Sequence[Entry],
    device: torch.device,
    deadline: Deadline,
    output: Path,
    rounds: int,
    peer_rounds: int,
    resume: bool = False,
) -> int:
    """Measure the entries in order and keep `output` up to date; returns the exit status."""
    result: dict[str, Any] = {"rows": [], "done": [], "unprepared": []}
    result["environment"] = environment(device, "python -m bench.suite")
    if resume and output.exists():
        result = json.loads(output.read_text())
    status = 0

    def save() -> None:
        result["left_out"] = [
            {"case": entry.case.name, "peers": entry.peers, "reason": NOT_REACHED}
            for entry in entries
            if entry.key not in result["done"]
        ]
        result["left_out"] += [*left_out(result["rows"]), *result["unprepared"]]
        results_file.write(output, result)

    save()
    for entry in entries:
        if entry.key in result["done"]:
            continue
        if deadline.passed():
            break
        print(f"{entry.case.name} ({deadline.remaining:.0f} s left)", file=sys.stderr)
        try:
            rows = measure(
                entry.case,
                device,
                rounds,
                entry.peers,
                peer_rounds=peer_rounds,
                with_energy=entry.case.name.startswith(HEADLINE_SHAPE) and entry.case.num_rows == HEADLINE_ROWS,
                deadline=deadline,
            )
        except DeviceLost as error:
            print(error, file=sys.stderr)
            rows, status = error.rows, DEVICE_LOST
        except Exception as error:
            # Inputs or reference: one case's trouble shall not cost the session.
            traceback.print_exc()
            rows = []
            result["unprepared"].append(
                {
                    "case": entry.case.name,
                    "peers": entry.peers,
                    "reason": f"could not be prepared: {failure_text(error)}",
                }
            )
        result["rows"] += rows
        result["done"].append(entry.key)
        save()
        if status == DEVICE_LOST:
            return status
    # What the deadline left out is not a failure.
    return int(bool(result["unprepared"]) or any(OUT_OF_TIME not in line for line in wrong(result["rows"])))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.suite", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default="gpu")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--deadline", type=float, default=240.0, help="seconds after which nothing new is begun")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peer-rounds", type=int, default=4, help="of contenders other than this package")
    parser.add_argument("--resume", action="store_true", help="go on after the entries that --output holds")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    deadline = Deadline(options.deadline)
    return run(
        plan(options.suite),
        torch.device(options.device),
        deadline,
        options.output,
        options.rounds,
        options.peer_rounds,
        options.resume,
    )


if __name__ == "__main__":
    sys.exit(main())
