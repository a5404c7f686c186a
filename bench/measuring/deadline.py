"""A point in time after which nothing new is begun."""

from __future__ import annotations

import time
from collections.abc import Callable


class Deadline:
    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    @property
    def remaining(self) -> float:
        """Seconds, negative afterwards."""
        return self._end - self._clock()

    def passed(self) -> bool:
        return self.remaining <= 0


NO_DEADLINE = Deadline(float("inf"))
