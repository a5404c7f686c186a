"""Checks of every row of a dataset before training: form, frame, template, number of contexts, length of each view.

A row that is found out when it is drawn ends a run after hours, and after its rollout was paid. A dataset with a length
is read once, at construction; a stream cannot be, its rows are checked as they are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from unisd.contexts import CONTEXT_COLUMNS, DEMONSTRATION, ContextSpec, PromptFrame, view_names, views_of_row
from unisd.turns import Prompt

OVERLONG = ("drop", "error")
"""Values of `UniSDConfig.overlong`."""

_BATCH = 256


@dataclass
class Measured:
    """Findings of one pass over n rows, apart from any limit on the lengths.

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
        """Join the parts, one behind the other."""
        lengths = [np.zeros((0, views), np.int32), *(part.lengths for part in parts)]
        plain = [np.zeros(0, bool), *(part.plain for part in parts)]
        faults, start = {}, 0
        for part in parts:
            faults.update({start + row: fault for row, fault in part.faults.items()})
            start += len(part.lengths)
        return cls(np.concatenate(lengths), faults, np.concatenate(plain))


@dataclass(frozen=True)
class RowChecker:
    """Conditions that the rows of a run have to satisfy.

    Attributes:
        spec: the views a row needs.
        frame: in which they stand.
        tokenize: prompts, all strings or all conversations, to lists of ids.
        num_embeddings: ids must be below it; None if the model does not tell.
        demonstrations: ids of the demonstrations of some rows, whose student's prompts come second; None where they are
            not trained on.
    """

    spec: ContextSpec
    frame: PromptFrame
    tokenize: Callable[[list[Prompt]], list[list[int]]]
    num_embeddings: int | None = None
    demonstrations: Callable[[list[Mapping[str, Any]], list[Prompt]], list[list[int]]] | None = None

    @property
    def views(self) -> list[str]:
        """Names of the views, as columns of `Measured.lengths`."""
        return [*view_names(self.spec), *([DEMONSTRATION] if self.demonstrations is not None else [])]

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
        for column, view in enumerate(view_names(self.spec)):
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
        if self.demonstrations is not None:
            good = [i for i in framed if i not in faults]
            replies = self.demonstrations([rows[i] for i in good], [framed[i]["prompt"] for i in good])
            lengths[good, -1] = [len(ids) for ids in replies]
        lengths[list(faults)] = 0
        return Measured(lengths, faults, np.array([_has_string(row) for row in rows], bool))

    def _ids(self, view: str, prompts: dict[int, Prompt], faults: dict[int, str]) -> list[tuple[int, list[int]]]:
        """Pairs (row, ids) of one view; rows that the template or the tokenizer refuses go into `faults`."""
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
        """Mark rows of the rarer form as faults: a batch is tokenized as its first row is."""
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
