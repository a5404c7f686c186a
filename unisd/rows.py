"""The datasets of a run on their way to the trainer: checked, without the rows that are too long.

Each process comes to the same result by itself. On every machine one goes first, so that the others find its result in
the cache where the check took long.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from torch.utils.data import Subset

from unisd import row_cache
from unisd.contexts import LengthLimit
from unisd.row_check import Measured, RowChecker, RowReport, StreamFilter, file_rows

logger = logging.getLogger(__name__)

CACHE_AFTER_SECONDS = 2.0
"""A check that took less is not worth a file."""


class RowGate:
    """Checks datasets, and keeps a report of each.

    Args:
        checker: what a row has to satisfy.
        limit: how long it may be.
        overlong: "drop" or "error".
        accelerator: of the run.
        tokenizer: for the key of the cache.
        template_options: what else is given to the chat template, for the same.
        tools: functions, likewise.
        frame_is_automatic: whether nobody chose the frame, so that it is worth a word.
        progress: whether to show a bar.

    Attributes:
        reports: of every dataset with a length, by its name.
    """

    def __init__(
        self,
        checker: RowChecker,
        limit: LengthLimit,
        *,
        overlong: str,
        accelerator: Accelerator,
        tokenizer: Any,
        template_options: Mapping[str, Any],
        tools: Sequence[Callable[..., Any]],
        frame_is_automatic: bool,
        progress: bool,
    ) -> None:
        self._checker, self._limit, self._overlong = checker, limit, overlong
        self._accelerator, self._tokenizer = accelerator, tokenizer
        described = [f"{tool.__name__}{inspect.signature(tool)}{tool.__doc__}" for tool in tools]
        self._template_options = {**template_options, "tools": described}
        self._frame_is_automatic = frame_is_automatic
        self._progress = progress
        self.reports: dict[str, RowReport] = {}

    def admit(self, dataset: Any, where: str) -> Any:
        """The dataset without its rows that are too long; a mapping of datasets likewise; None for None.

        Raises:
            ValueError: rows that cannot be used, all of them in one message; no rows; with `overlong="error"` rows
                that are too long, else nothing but such rows.
        """
        if dataset is None:
            return None
        if isinstance(dataset, Mapping):
            return {name: self.admit(one, f"{where}[{name!r}]") for name, one in dataset.items()}
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            return self._admit_stream(dataset, where)
        measured = self._measure(dataset, where)
        report = RowReport(where, measured, self._limit, self._checker.views, *file_rows(dataset))
        self.reports[where] = report
        report.raise_if_unusable(self._overlong)
        if self._accelerator.is_main_process:
            report.say()
            if self._frame_is_automatic and self._checker.frame.name == "chat" and report.measured.plain.any():
                logger.warning(
                    "%s: prompts and contexts that are strings go into the user message of the tokenizer's "
                    "chat template; prompt_frame='given' leaves them outside of it, 'chat' does so without a word",
                    where,
                )
        if not report.overlong:
            return dataset
        return dataset.select(report.kept) if hasattr(dataset, "select") else Subset(dataset, report.kept)

    def _measure(self, dataset: Any, where: str) -> Measured:
        file = row_cache.cache_file(dataset, self._checker, self._tokenizer, self._template_options)
        progress = self._progress and self._accelerator.is_local_main_process
        # Nothing is raised in here for a bad row: the processes that wait would wait for good.
        with self._accelerator.local_main_process_first():
            measured = None if file is None else row_cache.load(file)
            if measured is None:
                started = time.perf_counter()
                measured = self._checker.measure_all(dataset, where, progress)
                if file is not None and time.perf_counter() - started > CACHE_AFTER_SECONDS:
                    row_cache.save(file, measured)
        return measured

    def _admit_stream(self, dataset: Any, where: str) -> Any:
        if not hasattr(dataset, "filter"):
            return dataset  # another library's stream: the trainer checks each batch before its rollout
        log = self._accelerator.is_main_process
        return dataset.filter(StreamFilter(self._checker, self._limit, self._overlong, where, log), with_indices=True)
