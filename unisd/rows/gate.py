"""Admission of a run's datasets: checked, without the rows that are too long.

Each process comes to the same result by itself. On every machine one goes first, so that the others find its result in
the cache where the check took long.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import nn
from torch.utils.data import Subset

from unisd.contexts import ContextSpec, LengthLimit, PromptFrame
from unisd.guards import check_special_ids, check_steps
from unisd.parallelism import data_parallel_processes
from unisd.rows import cache
from unisd.rows.check import Measured, RowChecker
from unisd.rows.report import RowReport, file_rows
from unisd.rows.stream import StreamFilter

if TYPE_CHECKING:
    from unisd.config import UniSDConfig
    from unisd.trainer import UniSDTrainer

logger = logging.getLogger(__name__)

CACHE_AFTER_SECONDS = 2.0
"""Least time of a check whose findings are worth a file."""


class RowGate:
    """Check of datasets, with a report of each.

    Args:
        checker: what a row has to satisfy.
        limit: how long it may be.
        args: the `UniSDConfig`: what becomes of long rows, whether to show a bar, and whether somebody chose the frame.
        accelerator: of the run.
        tokenizer: for the key of the cache.
        template_options: what else is given to the chat template, for the same.
        tools: functions, likewise.

    Attributes:
        checker, limit: as given.
        reports: of every dataset with a length, by its name.
    """

    def __init__(
        self,
        checker: RowChecker,
        limit: LengthLimit,
        *,
        args: UniSDConfig,
        accelerator: Accelerator,
        tokenizer: Any,
        template_options: Mapping[str, Any],
        tools: Sequence[Callable[..., Any]],
    ) -> None:
        self.checker, self.limit, self._args = checker, limit, args
        self._accelerator, self._tokenizer = accelerator, tokenizer
        described = [f"{tool.__name__}{inspect.signature(tool)}{tool.__doc__}" for tool in tools]
        self._template_options = {**template_options, "tools": described}
        self.reports: dict[str, RowReport] = {}

    @classmethod
    def for_run(cls, trainer: UniSDTrainer, contexts: ContextSpec, student: nn.Module) -> RowGate:
        """The gate of a run.

        Raises:
            ValueError: a tokenizer that does not fit the model, or a frame that does not fit the tokenizer.
        """
        tokenizer: Any = trainer._tokenizer
        num_embeddings = getattr(student.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
        check_special_ids(tokenizer, num_embeddings)
        options: Any = trainer.chat_template_kwargs
        options = {**options, "chat_template": trainer.chat_template}
        frame = PromptFrame.of(trainer.args.prompt_frame, tokenizer, options)
        return cls(
            RowChecker(
                contexts,
                frame,
                trainer._prompt_ids,
                num_embeddings,
                trainer._demonstrations if contexts.supervised else None,
            ),
            LengthLimit.of_run(trainer.args, student.config),
            args=trainer.args,
            accelerator=trainer.accelerator,
            tokenizer=tokenizer,
            template_options=options,
            tools=trainer.tools,
        )

    def check_steps(self, where: str) -> None:
        """Raise ValueError if a dataset that was admitted has not the rows of an optimizer step."""
        report = self.reports.get(where)
        if report is not None:
            processes, log = data_parallel_processes(self._accelerator), self._accelerator.is_main_process
            check_steps(len(report.kept), len(report.overlong), self._args, processes, log=log)

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
        report = RowReport(where, measured, self.limit, self.checker.views, *file_rows(dataset))
        self.reports[where] = report
        report.raise_if_unusable(self._args.overlong)
        if self._accelerator.is_main_process:
            report.say()
            # A frame that nobody chose is worth a word.
            if self._args.prompt_frame == "auto" and self.checker.frame.name == "chat" and report.measured.plain.any():
                logger.warning(
                    "%s: prompts and contexts that are strings go into the user message of the tokenizer's "
                    "chat template; prompt_frame='given' leaves them outside of it, 'chat' does so without a word",
                    where,
                )
        if not report.overlong:
            return dataset
        return dataset.select(report.kept) if hasattr(dataset, "select") else Subset(dataset, report.kept)

    def _measure(self, dataset: Any, where: str) -> Measured:
        file = cache.cache_file(dataset, self.checker, self._tokenizer, self._template_options)
        progress = not self._args.disable_tqdm and self._accelerator.is_local_main_process
        # Nothing is raised in here for a bad row: the processes that wait would wait for good.
        with self._accelerator.local_main_process_first():
            measured = None if file is None else cache.load(file)
            if measured is None:
                started = time.perf_counter()
                measured = self.checker.measure_all(dataset, where, progress)
                if file is not None and time.perf_counter() - started > CACHE_AFTER_SECONDS:
                    cache.save(file, measured)
        return measured

    def _admit_stream(self, dataset: Any, where: str) -> Any:
        if not hasattr(dataset, "filter"):
            return dataset  # another library's stream: the trainer checks each batch before its rollout
        log = self._accelerator.is_main_process
        return dataset.filter(
            StreamFilter(self.checker, self.limit, self._args.overlong, where, log), with_indices=True
        )
