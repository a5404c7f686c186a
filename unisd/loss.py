"""`self_distillation_loss`: the loss of given completions in one call, for any training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from unisd.completions import CompletionBatch, hidden_rows
from unisd.modules import model_head, scoring_mode
from unisd_kernels import UniSDLoss, unisd_loss


def self_distillation_loss(
    model: nn.Module,
    student: CompletionBatch,
    teacher: CompletionBatch,
    *,
    auxiliary: Sequence[CompletionBatch] = (),
    negative: CompletionBatch | None = None,
    teacher_model: nn.Module | None = None,
    **settings: Any,
) -> UniSDLoss:
    """The UniSD loss of B completions of N tokens, each read after the student's prompt and after its other contexts.

    Runs the backbones and `unisd_kernels.unisd_loss`: the teacher's passes first, in eval mode and without gradients,
    then the student's in the mode that it is in. Autocast is the caller's: what surrounds the call holds for it.

    Args:
        model: the student, a causal language model or a PEFT model of one, not wrapped for several devices.
        student: the completions after the student's prompts (`unisd.completions.completion_batch`).
        teacher: the same completions after the teacher's prompts.
        auxiliary, negative: the same after K other contexts, and after a wrong demonstration.
        teacher_model: whose weights read everything but the student's prompt; None for the model itself as it is now.
        settings: of `unisd_kernels.unisd_loss` (`beta`, `temperature`, `clip_cap`, `feature_weight`, `num_items`, ...).

    Returns:
        `unisd_kernels.UniSDLoss`; `.loss` is the scalar to differentiate.

    Raises:
        ValueError: a wrapped model, a view of other completions than the student's, or what `unisd_loss` refuses.
    """
    for which, one in (("model", model), ("teacher_model", teacher_model)):
        if isinstance(one, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            raise ValueError(
                f"{which} is wrapped in {type(one).__name__}, past whose forward the gradients would not be averaged: "
                "use UniSDTrainer on several devices, or give model.module and average the gradients yourself"
            )
    named = [("teacher", teacher), *((f"auxiliary[{k}]", view) for k, view in enumerate(auxiliary))]
    if negative is not None:
        named.append(("negative", negative))
    for name, view in named:
        if not torch.equal(view.target_ids, student.target_ids) or view.lengths != student.lengths:
            raise ValueError(
                f"{name} holds {view.lengths} tokens of completions, student {student.lengths}, and they must be the "
                "same tokens: encode the same completions after every prompt"
            )
    scorer = model if teacher_model is None else teacher_model
    with scoring_mode(scorer):
        teacher_head = model_head(scorer)
        hidden = [hidden_rows(scorer, view) for _, view in named]
    # Autocast keeps 16-bit copies of the weights; those made without a graph must not serve the student's pass.
    torch.clear_autocast_cache()
    student_hidden = hidden_rows(model, student)
    return unisd_loss(
        student_hidden,
        model_head(model),
        hidden[0],
        teacher_head.detach(),
        student.target_ids,
        student.cu_seqlens,
        auxiliary_hidden=tuple(hidden[1 : 1 + len(auxiliary)]),
        negative_hidden=None if negative is None else hidden[-1],
        **settings,
    )
