"""Time and memory of the phases of optimizer steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PHASES = (
    "rollout",
    "contexts",
    "other views",
    "student",
    "head and loss",
    "backward",
    "optimizer",
    "moving average",
)
"""In the order of a step. "other views": teacher, auxiliary and negative contexts, which one pass may read together."""

REST = "rest"


class NoProfile:
    """A profile that measures nothing."""

    def phase(self, name: str) -> AbstractContextManager[Any]:
        return nullcontext()


@dataclass
class StepProfile:
    """Seconds and highest memory of each phase, of every step.

    A phase inside another one is taken out of it. On an accelerator the queue is waited for at both ends of a phase,
    which makes a profiled run slower than others.

    Attributes:
        device: of the run.
        steps: one mapping a step, phase -> seconds; "rest" is what no phase measured.
        memory: phase -> bytes: of an accelerator's allocator at the highest, else of the process at the phase's end.
    """

    device: torch.device
    steps: list[dict[str, float]] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    _open: list[list[float]] = field(default_factory=list, repr=False)
    _current: dict[str, float] = field(default_factory=dict, repr=False)
    _began: float | None = field(default=None, repr=False)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what runs inside."""
        if self._began is None:  # outside of a step, as in an evaluation
            yield
            return
        self._synchronize()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        started = time.perf_counter()
        self._open.append([0.0])
        try:
            yield
        finally:
            self._synchronize()
            taken = time.perf_counter() - started
            inner = self._open.pop()[0]
            if self._open:
                self._open[-1][0] += taken
            self._current[name] = self._current.get(name, 0.0) + taken - inner
            self.memory[name] = max(self.memory.get(name, 0), self._bytes())

    def begin_step(self) -> None:
        """A step begins, if none has."""
        if self._began is None:
            self._synchronize()
            self._began, self._current = time.perf_counter(), {}

    def end_step(self) -> None:
        """The step is over."""
        if self._began is None:
            return
        self._synchronize()
        total = time.perf_counter() - self._began
        self._current[REST] = max(0.0, total - sum(self._current.values()))
        self.steps.append(self._current)
        self._began = None

    def stop(self) -> None:
        """Leave out a step that has begun."""
        self._began = None

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if sys.platform != "linux":
            return 0
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096
