"""The interface of what scores sampled tokens under auxiliary views, and the scorer in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from unisd.batch import CompletionRows
from unisd.views.scorer import View


class Scorer(Protocol):
    """Something that scores sampled tokens under views: all that agreement needs of them."""

    def begin(self, batch: dict[str, Any], rows: CompletionRows, views: Sequence[View]) -> Callable[[], torch.Tensor]:
        """Start to score the N counted tokens `rows` of a batch under K views; the function that is returned waits for
        their log-probabilities [K, N], float32 (float64 where the weights are), at temperature 1, without gradient."""
        ...


@dataclass(frozen=True)
class LocalScorer:
    """The model here; inside `Teacher.scoring`.

    Attributes:
        hidden: from a batch, its N counted tokens and K views to K hidden states [N, H] (`ViewScorer`).
        logprobs: from hidden states [N, H] and ids [N] to the log-probabilities [N] of the ids.
    """

    hidden: Callable[[dict[str, Any], CompletionRows, Sequence[View]], Sequence[torch.Tensor]]
    logprobs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def begin(self, batch: dict[str, Any], rows: CompletionRows, views: Sequence[View]) -> Callable[[], torch.Tensor]:
        scores = torch.stack([self.logprobs(view, rows.ids) for view in self.hidden(batch, rows, views)])
        return lambda: scores
