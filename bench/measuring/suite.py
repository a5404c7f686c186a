"""`python -m bench suite --suite gpu --deadline 240 --output FILE`: many cases in one process, most important first.

The file is written after every peer. A peer that hangs is ended, and the process with it, after
`--watchdog` seconds; run again with `--resume`, it goes on, past whichever peer an earlier process did not return
from. What the deadline left out is in the file, with the reason. Tables: `python -m bench tables FILE`.

`gpu` is all of: `headline` (this package's designs and the floor), `peers` (the headline's peers), `heads` (other
models), `rows` (other N), `compiled` (torch.compile, whose first calls take minutes). Parts may be run one by one into
one file.

Exit status: 0; 1 if the floor or this package's default has no time in an entry that was run to its end, or is wrong,
or an entry could not be prepared; 3 if a peer took the accelerator with it: run again with `--resume`.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.cases import ACCELERATOR_CASES, CASES, HEADLINE_ROWS, HEADLINE_SHAPE, Case
from bench.measuring.deadline import Deadline
from bench.measuring.measure import DeviceLost, measure
from bench.measuring.setting import row_of
from bench.measuring.watchdog import Watchdog
from bench.parser import command_parser
from bench.peers import FLOOR, OURS, PEERS
from bench.records import results_file
from bench.records.environment import environment
from bench.records.failures import OUT_OF_TIME, failure_text, left_out
from bench.records.verdict import wrong

DEVICE_LOST = 3
NOT_REACHED = "not reached before the deadline"
NOT_TIMED = "not timed: the process ended while its case was measured"
# torch.compile's time is not in its figures, but in the session's: it runs last, for these row counts of one head.
COMPILED_ROWS = (HEADLINE_ROWS, 2048)
DESIGNS = ("unisd fused", "unisd chunked")
COMPILED = tuple(name for name in PEERS if name.startswith("dense") and PEERS[name].compiles)


@dataclass(frozen=True)
class Entry:
    """One case with some peers; the floor is always one of them."""

    case: Case
    peers: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.case.name}: {', '.join(self.peers)}"


def peers_for(case: Case) -> tuple[str, ...]:
    """At N = 8192 of the headline's head everything that has the operation; elsewhere what fits the time."""
    offering = [name for name, peer in PEERS.items() if case.operation in peer.operations and peer.fits(case)]
    if case.name.startswith("smoke"):
        return tuple(name for name in offering if not PEERS[name].compiles)
    skipped = set(COMPILED)
    if not case.name.startswith(HEADLINE_SHAPE):
        skipped |= {"unisd torch", "dense float32", "dense bfloat16", "liger chunked", "liger kl", "orda"}
    elif case.num_rows != HEADLINE_ROWS:
        skipped |= {"unisd torch", "dense bfloat16", "liger triton", "liger chunked", "liger kl", "orda"}
    return tuple(name for name in offering if name not in skipped)


def _headline() -> list[Case]:
    return [case for case in ACCELERATOR_CASES if _is_headline(case) and case.num_rows == HEADLINE_ROWS]


def _is_headline(case: Case) -> bool:
    return case.name.startswith(HEADLINE_SHAPE)


def _part(name: str) -> list[Entry]:
    if name == "headline":
        return [Entry(case, (FLOOR, OURS, *DESIGNS)) for case in _headline()]
    if name == "peers":
        return [Entry(case, tuple(peer for peer in peers_for(case) if not PEERS[peer].variant)) for case in _headline()]
    if name == "heads":
        return [Entry(case, peers_for(case)) for case in ACCELERATOR_CASES if not _is_headline(case)]
    if name == "rows":
        others = [case for case in ACCELERATOR_CASES if _is_headline(case) and case.num_rows != HEADLINE_ROWS]
        return [Entry(case, peers_for(case)) for case in others]
    assert name == "compiled", name
    return [
        Entry(case, (FLOOR, *COMPILED))
        for case in ACCELERATOR_CASES
        if _is_headline(case) and case.num_rows in COMPILED_ROWS
    ]


def plan(suite: str) -> list[Entry]:
    if suite == "smoke":
        names = ("smoke.kl", "smoke.kl_trainable", "smoke", "smoke.scoring")
        return [Entry(CASES[name], peers_for(CASES[name])) for name in names]
    return [entry for part in (PARTS if suite == "gpu" else (suite,)) for entry in _part(part)]


PARTS = ("headline", "peers", "heads", "rows", "compiled")
SUITES = ("gpu", *PARTS, "smoke")


class Record:
    """The result file as it grows.

    `rows` are tagged with the entry they belong to, so that those of an entry that is measured again are replaced.
    """

    def __init__(self, output: Path, device: torch.device, whole_plan: Sequence[Entry], resume: bool) -> None:
        self._output = output
        self._plan = whole_plan
        self.result: dict[str, Any] = {"rows": [], "done": [], "unprepared": [], "culprits": []}
        self.result["environment"] = environment(device)
        if resume and output.exists():
            self.result = json.loads(output.read_text())

    def begin(self, entry: Entry) -> None:
        self.result["rows"] = [row for row in self.result["rows"] if row["entry"] != entry.key]

    def keep(self, entry: Entry, rows: Sequence[dict[str, Any]]) -> None:
        """Write what an entry has so far; what has no time yet says so, should this be the last that is heard of it."""
        self.begin(entry)
        for row in rows:
            pending = {} if "failure" in row or "median_seconds" in row else {"failure": NOT_TIMED}
            self.result["rows"].append({**row, **pending, "entry": entry.key})
        self.save()

    def end(self, entry: Entry, rows: Sequence[dict[str, Any]]) -> None:
        self.result["done"].append(entry.key)
        self.keep(entry, rows)

    def blame(self, call: dict[str, Any]) -> None:
        limit = call["limit_seconds"]
        reason = f"ended the process in its {call['stage']} of {call['case']}: a crash, or no answer within {limit:g} s"
        self.result["culprits"].append({"peer": call["peer"], "operation": call["operation"], "reason": reason})
        self.save()

    def blamed(self, peer: str, case: Case) -> str | None:
        """Reason not to run a peer again: it ended an earlier process with this operation."""
        for culprit in self.result["culprits"]:
            if (culprit["peer"], culprit["operation"]) == (peer, case.operation):
                return str(culprit["reason"])
        return None

    def save(self) -> None:
        self.result["left_out"] = [
            {"case": entry.case.name, "peers": entry.peers, "reason": NOT_REACHED}
            for entry in self._plan
            if entry.key not in self.result["done"]
        ]
        self.result["left_out"] += [*left_out(self.result["rows"]), *self.result["unprepared"]]
        results_file.write(self._output, self.result)


def run(
    entries: Sequence[Entry],
    device: torch.device,
    deadline: Deadline,
    output: Path,
    rounds: int,
    peer_rounds: int,
    resume: bool = False,
    watchdog_seconds: float = 90.0,
    whole_plan: Sequence[Entry] | None = None,
) -> int:
    """Measure the entries in order and keep `output` up to date; returns the exit status.

    Args:
        watchdog_seconds: a peer's call that takes longer ends the process.
        whole_plan: what the file is about, where the entries are a part of it.
    """
    record = Record(output, device, whole_plan or entries, resume)
    watchdog = Watchdog(in_flight(output), watchdog_seconds)
    culprit = watchdog.culprit()
    if culprit is not None and resume:
        record.blame(culprit)
    status = 0
    record.save()
    for entry in entries:
        if entry.key in record.result["done"]:
            continue
        if deadline.passed():
            break
        print(f"{entry.case.name} ({deadline.remaining:.0f} s left)", file=sys.stderr)
        blamed = {peer: reason for peer in entry.peers if (reason := record.blamed(peer, entry.case))}
        absent = [
            {**row_of(entry.case, beta, PEERS[peer], device), "failure": reason}
            for beta in entry.case.beta
            for peer, reason in blamed.items()
        ]
        record.begin(entry)
        try:
            rows = measure(
                entry.case,
                device,
                rounds,
                [peer for peer in entry.peers if peer not in blamed],
                peer_rounds=peer_rounds,
                with_energy=_is_headline(entry.case) and entry.case.num_rows == HEADLINE_ROWS,
                deadline=deadline,
                watchdog=watchdog,
                keep=lambda rows, entry=entry, absent=absent: record.keep(entry, [*rows, *absent]),  # type: ignore[misc]
            )
        except DeviceLost as error:
            print(error, file=sys.stderr)
            rows, status = error.rows, DEVICE_LOST
        except Exception as error:
            # Inputs or reference: one case's trouble shall not cost the session.
            traceback.print_exc()
            rows = []
            record.result["unprepared"].append(
                {
                    "case": entry.case.name,
                    "peers": entry.peers,
                    "reason": f"could not be prepared: {failure_text(error)}",
                }
            )
        record.end(entry, [*rows, *absent])
        if status == DEVICE_LOST:
            return status
    # What the deadline left out is not a failure.
    failed = [line for line in wrong(record.result["rows"]) if OUT_OF_TIME not in line]
    return int(bool(record.result["unprepared"]) or bool(failed))


def in_flight(output: Path) -> Path:
    """File beside the results that holds the call in flight (`watchdog.py`)."""
    return output.with_name(output.name + ".in_flight")


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("suite", __doc__)
    parser.add_argument("--suite", choices=SUITES, default="gpu")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--deadline", type=float, default=240.0, help="seconds after which nothing new is begun")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peer-rounds", type=int, default=4, help="of peers other than this package")
    parser.add_argument("--watchdog", type=float, default=90.0, help="seconds after which a call is taken to hang")
    parser.add_argument("--resume", action="store_true", help="go on after the entries that --output holds")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    return run(
        plan(options.suite),
        torch.device(options.device),
        Deadline(options.deadline),
        options.output,
        options.rounds,
        options.peer_rounds,
        options.resume,
        options.watchdog,
        plan("gpu") if options.suite in PARTS else None,
    )
