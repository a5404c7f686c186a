"""Every row of a dataset, checked before training: form, frame, template, number of contexts, length of each view.

A row that is found out when it is drawn ends a run after hours, and after its rollout was paid. A dataset with a length
is read once, at construction; a stream cannot be, its rows are checked as they are drawn.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from unisd.contexts import CONTEXT_COLUMNS, ContextSpec, LengthLimit, view_names, views_of_row
from unisd.frames import Prompt, PromptFrame

OVERLONG = ("drop", "error")
"""Values of `UniSDConfig.overlong`."""

_BATCH = 256
_SHOWN_ROWS = 20
_SHOWN_FAULTS = 12

logger = logging.getLogger(__name__)


@dataclass
class Measured:
    """What one pass over n rows found, apart from any limit on the lengths.

    Attributes:
        lengths: [n, views] int32 tokens of every view; 0 in rows with a fault.
        faults: row -> what is wrong with it.
        plain: [n] whether the row's prompt or a view of it was given as a string.
    """

    lengths: np.ndarray
    faults: dict[int, str] = field(default_factory=dict)
    plain: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    @classmethod
    def join(cls, parts: Sequence[Measured], views: int) -> Measured:
        """The parts one behind the other."""
        lengths = [np.zeros((0, views), np.int32), *(part.lengths for part in parts)]
        plain = [np.zeros(0, bool), *(part.plain for part in parts)]
        faults, start = {}, 0
        for part in parts:
            faults.update({start + row: fault for row, fault in part.faults.items()})
            start += len(part.lengths)
        return cls(np.concatenate(lengths), faults, np.concatenate(plain))


@dataclass(frozen=True)
class RowChecker:
    """What the rows of a run have to satisfy.

    Attributes:
        spec: the views a row needs.
        frame: in which they stand.
        tokenize: prompts, all strings or all conversations, to lists of ids.
        num_embeddings: ids must be below it; None if the model does not tell.
    """

    spec: ContextSpec
    frame: PromptFrame
    tokenize: Callable[[list[Prompt]], list[list[int]]]
    num_embeddings: int | None = None

    @property
    def views(self) -> list[str]:
        """Names of the views, as columns of `Measured.lengths`."""
        return view_names(self.spec)

    def measure(self, rows: Sequence[Mapping[str, Any]]) -> Measured:
        """Read the views of some rows and count their tokens."""
        lengths = np.zeros((len(rows), len(self.views)), np.int32)
        faults: dict[int, str] = {}
        framed: dict[int, dict[str, Prompt]] = {}
        for i, row in enumerate(rows):
            try:
                framed[i] = views_of_row(row, self.spec, self.frame)
            except (ValueError, TypeError) as error:
                faults[i] = str(error)
        for column, view in enumerate(self.views):
            # A batch for the tokenizer has one form.
            for form in (str, list):
                chosen = [i for i, views in framed.items() if i not in faults and isinstance(views[view], form)]
                for i, ids in self._ids(view, {i: framed[i][view] for i in chosen}, faults):
                    lengths[i, column] = len(ids)
                    if not ids:
                        faults[i] = f"the {view} is empty"
                    elif self.num_embeddings is not None and max(ids) >= self.num_embeddings:
                        faults[i] = (
                            f"the {view} holds token id {max(ids)}, but the model has {self.num_embeddings} "
                            "embeddings; give the model's own tokenizer, or resize the embeddings"
                        )
        lengths[list(faults)] = 0
        return Measured(lengths, faults, np.array([_has_string(row) for row in rows], bool))

    def _ids(self, view: str, prompts: dict[int, Prompt], faults: dict[int, str]) -> list[tuple[int, list[int]]]:
        """(row, ids) of one view; rows that the template or the tokenizer refuses go into `faults`."""
        if not prompts:
            return []
        try:
            return list(zip(prompts, self.tokenize(list(prompts.values())), strict=True))
        except Exception as error:
            # A template is a program of its own and raises what it likes. Which row it was is told one by one.
            if len(prompts) > 1:
                return [pair for i, prompt in prompts.items() for pair in self._ids(view, {i: prompt}, faults)]
            ((i, prompt),) = prompts.items()
            by = "tokenizer" if isinstance(prompt, str) else "chat template"
            faults[i] = f"the {view} is refused by the {by} ({type(error).__name__}: {' '.join(str(error).split())})"
            return []

    def measure_all(self, dataset: Any, where: str, progress: bool) -> Measured:
        """`measure` of a whole dataset, with a bar that appears if it takes longer than a second."""
        parts = []
        with tqdm(total=len(dataset), desc=f"checking {where}", unit=" rows", delay=1.0, disable=not progress) as bar:
            for rows in _batches(dataset):
                parts.append(self.measure(rows))
                bar.update(len(rows))
        measured = Measured.join(parts, len(self.views))
        if self.frame.name == "given":
            self._refuse_second_form(measured)
        return measured

    def _refuse_second_form(self, measured: Measured) -> None:
        """A batch is tokenized as its first row is."""
        good = [i for i in range(len(measured.lengths)) if i not in measured.faults]
        strings = int(measured.plain[good].sum())
        if strings in (0, len(good)):
            return
        rarer = strings <= len(good) - strings
        forms = ("strings", "conversations") if rarer else ("conversations", "strings")
        for i in good:
            if measured.plain[i] == rarer:
                measured.lengths[i] = 0
                measured.faults[i] = (
                    f"its prompts are {forms[0]}, those of most rows are {forms[1]}, but a batch is read in one form; "
                    "use one, or prompt_frame='chat'"
                )


@dataclass(frozen=True)
class RowReport:
    """What was found in a dataset.

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
        """Log what is dropped, else the longest view."""
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
    """The number of each row in the table that the dataset was loaded from, whatever was shuffled, filtered or picked
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


class StreamFilter:
    """Checks the rows of a stream as they are drawn: for `IterableDataset.filter(..., with_indices=True)`.

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


def _ordinal(n: int) -> str:
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


def _batches(dataset: Any) -> Iterator[list[Mapping[str, Any]]]:
    columns = getattr(dataset, "column_names", None)
    transformed = (getattr(dataset, "format", None) or {}).get("type") == "custom"  # may need any column
    if columns is not None and not transformed:
        # Other columns may be images, and costly to decode.
        dataset = dataset.select_columns([name for name in ("prompt", *CONTEXT_COLUMNS) if name in columns])
    for start in range(0, len(dataset), _BATCH):
        stop = min(start + _BATCH, len(dataset))
        if columns is None:
            yield [dataset[i] for i in range(start, stop)]
        else:
            batch = dataset[start:stop]
            yield [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _has_string(row: Mapping[str, Any]) -> bool:
    values = [row.get(name) for name in ("prompt", "teacher_prompt", "negative_prompt")]
    auxiliary = row.get("auxiliary_prompts")
    return any(isinstance(value, str) for value in [*values, *(auxiliary if isinstance(auxiliary, list) else ())])
