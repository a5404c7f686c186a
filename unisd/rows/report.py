"""Findings of a dataset's check, told in one message: rows that cannot be used, rows that are dropped."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unisd.contexts import DEMONSTRATION, LengthLimit
from unisd.rows.check import Measured

_SHOWN_ROWS = 20
_SHOWN_FAULTS = 12

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowReport:
    """Findings of the check of a dataset.

    Attributes:
        where: "train_dataset", "eval_dataset['name']".
        measured: what is in its rows.
        limit: the longest they may be.
        views: names of the columns of `measured.lengths`.
        numbers: of the rows in the table the dataset was loaded from, see `file_rows`.
        counted: how, for messages.
    """

    where: str
    measured: Measured
    limit: LengthLimit
    views: list[str]
    numbers: Sequence[int]
    counted: str = "as in the dataset"

    @property
    def faults(self) -> dict[int, str]:
        """Position -> fault of the rows that cannot be used at all."""
        return self.measured.faults

    @property
    def overlong(self) -> dict[int, str]:
        """Position -> the limit that the row exceeds, of the rows that are good but for their length."""
        lengths = self.measured.lengths
        limits = [n for n in (self.limit.prompt, self.limit.total, self.limit.rollout) if n is not None]
        if DEMONSTRATION in self.views:
            limits.append(2 * self.limit.completion)  # it is to be no longer than a completion
        if not limits:
            return {}
        out: dict[int, str] = {}
        for i in np.flatnonzero(lengths.max(1, initial=0) + self.limit.completion > min(limits)).tolist():
            excesses = (self.limit.excess(view, int(n)) for view, n in zip(self.views, lengths[i], strict=True))
            excess = next((text for text in excesses if text is not None), None)
            if excess is not None:
                out[i] = excess
        return out

    @property
    def kept(self) -> list[int]:
        """Positions of the rows to train on."""
        left_out = self.faults.keys() | self.overlong.keys()
        return [i for i in range(len(self.measured.lengths)) if i not in left_out]

    def longest(self, positions: Sequence[int] | None = None) -> str:
        """ "812 tokens (teacher prompt of row 17)": the longest view of all rows, or of those at some positions."""
        lengths = self.measured.lengths if positions is None else self.measured.lengths[list(positions)]
        row, view = np.unravel_index(int(lengths.argmax()), lengths.shape)
        number = self.numbers[int(row) if positions is None else positions[int(row)]]
        return f"{lengths[row, view]} tokens ({self.views[int(view)]} of row {number})"

    def raise_if_unusable(self, overlong: str) -> None:
        """Raise one ValueError that tells every fault, with counts and row numbers.

        Args:
            overlong: "drop" or "error", what becomes of rows that are too long.
        """
        total = len(self.measured.lengths)
        too_long = self.overlong
        refused = len(self.faults) + (len(too_long) if overlong == "error" else 0)
        if refused == 0 and len(too_long) < total:
            return
        if total == 0:
            raise ValueError(f"{self.where} has no rows")
        lines = _lines(self.faults, self.numbers)
        if too_long:
            what = "would be dropped" if overlong == "drop" else "raise the limit, or drop them with overlong='drop'"
            longest = self.longest(list(too_long))
            limits = {i: f"too long, {text}; the longest has {longest}; {what}" for i, text in too_long.items()}
            lines += _lines(limits, self.numbers)
        head = f"{refused} of {total} rows cannot be used" if refused else f"all {total} rows are too long"
        raise ValueError(f"{self.where}: {head} (rows are counted from 0, {self.counted}):\n  " + "\n  ".join(lines))

    def say(self) -> None:
        """Log the rows that are dropped, else the longest view."""
        too_long, total = self.overlong, len(self.measured.lengths)
        if not too_long:
            logger.info("%s: %d rows checked, the longest view has %s", self.where, total, self.longest())
            return
        logger.warning(
            "%s: %d of %d rows are dropped, because a view is too long (overlong='error' refuses them instead; rows "
            "are counted from 0, %s). The longest has %s.\n  %s",
            self.where,
            len(too_long),
            total,
            self.counted,
            self.longest(list(too_long)),
            "\n  ".join(_lines(too_long, self.numbers)),
        )


def file_rows(dataset: Any) -> tuple[Sequence[int], str]:
    """Number of each row in the table that the dataset was loaded from, whatever was shuffled, filtered or picked
    since, and how it is counted. A part cut out in one piece ("train[10:20]", `select(range(10, 20))`) is a
    table of its own, which does not know where it began.
    """
    # What `datasets` keeps of a selection, a filter or a shuffle.
    indices = getattr(dataset, "_indices", None)
    numbers = range(len(dataset)) if indices is None else indices.column(0).to_pylist()
    splits, split = getattr(getattr(dataset, "info", None), "splits", None), getattr(dataset, "split", None)
    if not splits or split is None or str(split).split("[")[0] not in splits:
        return numbers, "as in the dataset"
    whole = splits[str(split).split("[")[0]].num_examples == dataset.data.num_rows
    return numbers, "as in the file" if whole else "from the start of the selected part of the file"


def _lines(faults: Mapping[int, str], numbers: Sequence[int]) -> list[str]:
    """One line for each kind of fault, the most frequent first: count, row numbers, text."""
    counts = Counter(faults.values()).most_common()
    lines = []
    for text, count in counts[:_SHOWN_FAULTS]:
        rows = sorted(numbers[i] for i, fault in faults.items() if fault == text)
        lines.append(f"{count} row{'s'[: count > 1]} ({_ranges(rows)}): {text}")
    rest = sum(count for _, count in counts[_SHOWN_FAULTS:])
    return [*lines, f"and {rest} rows with other faults"] if rest else lines


def _ranges(rows: Sequence[int]) -> str:
    """ "3, 17-20, 44, ..." of ascending numbers."""
    spans: list[list[int]] = []
    for row in rows:
        if spans and row == spans[-1][1] + 1:
            spans[-1][1] = row
        else:
            spans.append([row, row])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in spans[:_SHOWN_ROWS]]
    return ", ".join(shown if len(spans) <= _SHOWN_ROWS else [*shown, "..."])
