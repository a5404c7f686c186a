"""Carrying out a sweep: each run is a process of its own, and what is finished is not done again."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from unisd.evaluation.folder import EVALUATIONS
from unisd.run.checkpoints import is_checkpoint
from unisd.sweep.cells import FINISHED, Cell, finished
from unisd_kernels.files import write_json

_OUT_OF_MEMORY = ("CUDA out of memory", "OutOfMemoryError", "CUDA error: out of memory")
_BATCH, _ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"

Launch = Callable[[Sequence[str], Path], int]
"""(words after `unisd`, file for what it prints) -> exit status."""


def launch(words: Sequence[str], log: Path) -> int:
    """Run `unisd WORDS` in a process of its own; what it prints is added to the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream:
        print("unisd " + " ".join(words), file=stream, flush=True)
        command = [sys.executable, "-m", "unisd", *words]
        return subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        cell: which.
        status: "finished", "found" (it was finished before) or "failed".
        reason: last line of what a failed one said.
    """

    cell: Cell
    status: str
    reason: str = ""


@dataclass
class Sweep:
    """Settings of a sweep.

    Attributes:
        output: folder, with a folder for each run and `logs/`.
        train: further words for `unisd train`.
        evaluations: words for `unisd eval`, one list for each evaluation; model and output are added.
        drift: whether also to evaluate the drift on own completions.
        say: prints a line.
        launch: runs a command.
    """

    output: Path
    train: Sequence[str] = ()
    evaluations: Sequence[Sequence[str]] = ()
    drift: bool = False
    say: Callable[[str], None] = partial(print, flush=True)
    launch: Launch = launch

    def run(self, cells: Sequence[Cell]) -> list[Outcome]:
        """Carry out the runs that are not finished. One that fails is told and does not end the others."""
        outcomes = []
        for number, cell in enumerate(cells, 1):
            before = f"[{number}/{len(cells)}] {cell.name}"
            if finished(self.output / cell.name) is not None:
                self.say(f"{before}: finished before")
                outcomes.append(Outcome(cell, "found"))
                continue
            self.say(f"{before}: begins")
            started = time.perf_counter()
            reason = self._one(cell)
            took = f"{time.perf_counter() - started:.0f} s"
            if reason:
                self.say(f"{before}: failed after {took}: {reason} ({self._log(cell)})")
            else:
                self.say(f"{before}: finished in {took}")
            outcomes.append(Outcome(cell, "failed" if reason else "finished", reason))
        return outcomes

    def _one(self, cell: Cell) -> str:
        """Train and evaluate; "" or why it failed."""
        folder, log = self.output / cell.name, self._log(cell)
        smaller: dict[str, int] = {}
        while not (folder / "trainer_state.json").is_file():  # which is written last
            begins_at = log.stat().st_size if log.is_file() else 0
            words = [*self._train_words(cell, folder), *(w for n, v in smaller.items() for w in (f"--{n}", str(v)))]
            if self.launch(words, log) == 0:
                continue
            said = _said(log, begins_at)
            if not any(text in said for text in _OUT_OF_MEMORY):
                return _last_line(said)
            batch, accumulation = self._sizes(folder, smaller)
            if batch < 2:
                return f"out of memory with a micro-batch of {batch}: {_last_line(said)}"
            smaller = {_BATCH: batch // 2, _ACCUMULATION: accumulation * 2}
            self.say(
                f"{cell.name}: out of memory with a micro-batch of {batch}; again with {smaller[_BATCH]}, and "
                f"{smaller[_ACCUMULATION]} of them a step instead of {accumulation}"
            )
        for asked in [*self.evaluations, *([["drift"]] if self.drift else [])]:
            begins_at = log.stat().st_size if log.is_file() else 0
            if self.launch(["eval", *asked, "--model", str(folder), "-o", str(folder / EVALUATIONS)], log) != 0:
                return _last_line(_said(log, begins_at))
        record = {"data": cell.data, "preset": cell.preset, "seed": cell.seed, "made_smaller": smaller}
        write_json(folder / FINISHED, record)
        return ""

    def _train_words(self, cell: Cell, folder: Path) -> list[str]:
        words = ["train", "--dataset", cell.data, "--preset", cell.preset, "--seed", str(cell.seed)]
        words += ["--output_dir", str(folder), *self.train]
        if folder.is_dir() and any(is_checkpoint(entry) for entry in folder.iterdir()):
            return [*words, "--resume", "true"]
        return [*words, "--overwrite_output_dir"] if folder.is_dir() and any(folder.iterdir()) else words

    def _sizes(self, folder: Path, smaller: dict[str, int]) -> tuple[int, int]:
        """Micro-batch and accumulation of the run that was just made."""
        if smaller:
            return smaller[_BATCH], smaller[_ACCUMULATION]
        settings = folder / "unisd_config.yaml"
        if settings.is_file():
            read = yaml.safe_load(settings.read_text(encoding="utf-8"))
            return int(read[_BATCH]), int(read[_ACCUMULATION])
        given = dict(zip(self.train, self.train[1:], strict=False))
        return int(given.get(f"--{_BATCH}", 4)), int(given.get(f"--{_ACCUMULATION}", 4))

    def _log(self, cell: Cell) -> Path:
        return self.output / "logs" / f"{cell.name}.log"


def _said(log: Path, begins_at: int) -> str:
    if not log.is_file():
        return ""
    with log.open("rb") as stream:
        stream.seek(begins_at)
        return stream.read().decode("utf-8", "replace")


def _last_line(text: str) -> str:
    """The last line that names an error, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line.lower()]
    return (errors or lines or ["it said nothing"])[-1]
