"""Rows of a stream, checked as they are drawn."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from unisd.contexts import LengthLimit
from unisd.rows.check import RowChecker
from unisd.rows.report import RowReport

logger = logging.getLogger(__name__)


class StreamFilter:
    """Filter for `IterableDataset.filter(..., with_indices=True)` that drops rows which are too long.

    Raises, when called:
        ValueError: a row that cannot be used, or is too long with `overlong="error"`.
    """

    def __init__(self, checker: RowChecker, limit: LengthLimit, overlong: str, where: str, log: bool) -> None:
        self._checker, self._limit, self._overlong, self._where, self._log = checker, limit, overlong, where, log
        self.dropped = 0

    def __call__(self, row: Mapping[str, Any], number: int) -> bool:
        """Whether to keep the row."""
        report = RowReport(
            self._where,
            self._checker.measure([row]),
            self._limit,
            self._checker.views,
            range(number, number + 1),
            "as they are drawn",
        )
        if report.overlong and self._overlong == "drop":
            self.dropped += 1
            if self._log and self.dropped & (self.dropped - 1) == 0:  # the first, second, fourth, eighth, ...
                logger.warning(
                    "%s: row %d of the stream is dropped, the %s so far: it has %s, %s",
                    self._where,
                    number,
                    _ordinal(self.dropped),
                    report.longest(),
                    report.overlong[0],
                )
            return False
        report.raise_if_unusable(self._overlong)
        return True


def _ordinal(n: int) -> str:
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"
