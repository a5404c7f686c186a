"""Runs of a study side by side, each in a process forked from one that has imported everything.

Importing torch, transformers and TRL takes ten seconds of a core, and a study starts over a hundred commands. The
parent imports and starts no thread; a command is a child of it that runs `unisd WORDS`. Where there is no fork, each
command is a process of its own, as in `unisd sweep`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.studies.forked import forked, print_to
from unisd.sweep.run import launch as in_a_new_process

COSTS = ".costs.jsonl"
"""Beside a log: what each of its commands took."""
FORKS = sys.platform == "linux"


def warm() -> None:
    """Import what the commands need, and compute nothing: a fork has only the thread that forks."""
    import unisd.cli.evaluate
    import unisd.cli.evaluate_benchmarks
    import unisd.cli.prepare
    import unisd.cli.train  # noqa: F401


def run_side_by_side(work: Sequence[tuple[str, Callable[[], int]]], jobs: int, say: Callable[[str], None]) -> list[str]:
    """Carry out pieces of work, `jobs` at a time; each is a function whose value is an exit status.

    Returns:
        names of those that failed.
    """
    if not FORKS:
        jobs = 1
    pending, running, failed = list(work), dict[int, tuple[str, float]](), []
    started, done = time.monotonic(), 0
    while pending or running:
        while pending and len(running) < jobs:
            name, function = pending.pop(0)
            running[forked(function)] = (name, time.monotonic())
        pid, status = os.wait()
        name, began = running.pop(pid)
        done += 1
        if status:
            failed.append(name)
        left = (time.monotonic() - started) / done * (len(work) - done) / 60
        said = "FAILED after" if status else "finished in"
        say(f"[{done}/{len(work)}] {name} {said} {time.monotonic() - began:.0f} s; about {left:.0f} minutes left")
    return failed


def launch(words: Sequence[str], log: Path) -> int:
    """Run `unisd WORDS`; what it prints, and what it took, are added to the log and to the file beside it."""
    if not FORKS:
        return in_a_new_process(words, log)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream:
        print("unisd " + " ".join(words), file=stream, flush=True)
        began = time.monotonic()
        pid = forked(lambda: _command(words, stream.fileno()))
    _, status, used = os.wait4(pid, 0)
    took = {
        "command": words[0],
        "status": status,
        "seconds": round(time.monotonic() - began, 1),
        "core_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_memory_gib": round(used.ru_maxrss / 2**20, 3),
    }
    with log.with_suffix(COSTS).open("a", encoding="utf-8") as stream:
        print(json.dumps(took), file=stream)
    return os.waitstatus_to_exitcode(status)


def _command(words: Sequence[str], log: int) -> int:
    print_to(log, log)
    import torch

    from unisd.cli import main

    torch.set_num_threads(1)
    return main(list(words))
