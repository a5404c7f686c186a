"""Token ids of every view of a batch, and how long they may be.

They come from TRL's own `_tokenize_prompts`, so that chat template, tools and special tokens are those of the rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from unisd.batch import padded
from unisd.contexts.columns import DEMONSTRATION, RowViews
from unisd.turns import Prompt


@dataclass(frozen=True)
class LengthLimit:
    """Longest admissible contexts, in tokens; None for no limit.

    Attributes:
        prompt: of a context (`max_prompt_length`).
        total: of context and completion together (the model's `max_position_embeddings`).
        completion: the most tokens a completion may have (`max_completion_length`).
        rollout: of the student's prompt and completion together, if the sampler takes less than the model (vLLM).
    """

    prompt: int | None
    total: int | None
    completion: int = 0
    rollout: int | None = None

    @classmethod
    def of_run(cls, args: Any, model_config: Any) -> LengthLimit:
        """The limit of a run.

        Args:
            args: the `UniSDConfig`.
            model_config: of the model, as transformers has it.
        """
        return cls(
            args.max_prompt_length,
            getattr(model_config.get_text_config(), "max_position_embeddings", None),
            completion=int(args.max_completion_length or 0),
            rollout=args.vllm_max_model_length if args.use_vllm else None,
        )

    def excess(self, view: str, length: int) -> str | None:
        """Reason why a context of this view and length (or a demonstration, which is a completion) is too long, or None
        if it is not."""
        if view == DEMONSTRATION:
            return f"more than max_completion_length={self.completion}" if length > self.completion else None
        if self.prompt is not None and length > self.prompt:
            return f"more than max_prompt_length={self.prompt}"
        if self.total is not None and length + self.completion > self.total:
            completion = f"with max_completion_length={self.completion} " if self.completion else ""
            return f"{completion}more than the model's {self.total} positions"
        if self.rollout is not None and view == "prompt" and length + self.completion > self.rollout:
            return f"with max_completion_length={self.completion} more than vllm_max_model_length={self.rollout}"
        return None

    def check(self, view: str, lengths: Sequence[int]) -> None:
        """Raise ValueError if a context of this view is too long. Nothing is truncated: a truncated context would
        be another question, and left truncation eats the system prompt and the demonstration first."""
        for row, length in enumerate(lengths):
            excess = self.excess(view, length)
            if excess is not None:
                raise ValueError(
                    f"the {view} of row {row} of the batch has {length} tokens, {excess}; raise the limit, or drop "
                    "such rows from the dataset (nothing is truncated)"
                )


def tokenize_views(
    views: RowViews,
    tokenize: Callable[[list[Prompt]], list[list[int]]],
    limit: LengthLimit,
    *,
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
) -> dict[str, torch.Tensor]:
    """Left-padded ids and masks of every view, so that the completions appended to them align. The student's own
    prompt, which the rollout tokenizes, is checked alike.

    Args:
        views: of B rows.
        tokenize: prompts to lists of ids.
        limit: see `LengthLimit`.
        pad_token_id, pad_to_multiple_of: as in TRL.

    Returns:
        int64 tensors whose first dimension is B, so that TRL can shuffle and split them with the batch:
        `teacher_prompt_ids`, `teacher_prompt_mask` [B, L_t]; with auxiliary views `auxiliary_prompt_ids`,
        `auxiliary_prompt_mask` [B, K, L_a]; with a negative `negative_prompt_ids`, `negative_prompt_mask` [B, L_n].

    Raises:
        ValueError: a context that is too long or empty, a view that mixes strings and conversations.
    """
    ids: list[list[list[int]]] = []
    for name, prompts in [("prompt", views.student), *views.named()]:
        if len({isinstance(prompt, str) for prompt in prompts}) > 1:
            raise ValueError(f"the {name}s of one batch mix strings and conversations; use one form in a column")
        tokens = tokenize(prompts)
        lengths = [len(row) for row in tokens]
        if 0 in lengths:
            raise ValueError(f"the {name} of row {lengths.index(0)} of the batch is empty")
        limit.check(name, lengths)
        ids.append(tokens)
    del ids[0]
    pad = partial(padded, value=pad_token_id, side="left", multiple=pad_to_multiple_of)
    batch, num_auxiliary = len(views.teacher), len(views.auxiliary)
    out: dict[str, torch.Tensor] = {}
    if views.teacher:
        out["teacher_prompt_ids"], out["teacher_prompt_mask"] = pad(ids[0])
    if num_auxiliary:
        flat = [ids[1 + k][b] for b in range(batch) for k in range(num_auxiliary)]
        for name, tensor in zip(("auxiliary_prompt_ids", "auxiliary_prompt_mask"), pad(flat), strict=True):
            out[name] = tensor.view(batch, num_auxiliary, -1)
    if views.negative is not None:
        out["negative_prompt_ids"], out["negative_prompt_mask"] = pad(ids[-1])
    return out
