"""`self_distillation_loss`: the loss of given completions in one call, for any training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from unisd.completions import CompletionBatch, hidden_rows
from unisd.mixture import MIXTURES, Views, check_common_head, check_softcap, mixed, parts_of_teacher
from unisd.modules import model_head, scoring_mode
from unisd_kernels import UniSDLoss, unisd_loss
from unisd_kernels.config import check_choice, check_number


def self_distillation_loss(
    model: nn.Module,
    student: CompletionBatch,
    teacher: CompletionBatch,
    *,
    auxiliary: Sequence[CompletionBatch] = (),
    negative: CompletionBatch | None = None,
    teacher_model: nn.Module | None = None,
    teacher_mixture: str = "self",
    mixture_alpha: float = 0.5,
    agreement: str = "token",
    **settings: Any,
) -> UniSDLoss:
    """The UniSD loss of B completions of N tokens, each read after the student's prompt and after its other contexts.

    Runs the backbones and `unisd_kernels.unisd_loss`: the teacher's passes first, in eval mode and without gradients,
    then the student's in the mode that it is in. Autocast is the caller's: what surrounds the call holds for it.

    The teacher is the distribution after `teacher`, or with `teacher_mixture` a mixture, by `unisd_kernels.mix_hidden`
    of hidden states [N, H] of the teacher h_t, of the K auxiliary contexts h_k, of the negative one h_n, and of the
    student's own pass h_s, without a gradient (docs/mixtures.md):

        consensus     (h_t + sum_k h_k) / (K + 1)
        contrastive   h_t + alpha (h_t - h_n)
        pmi           h_t + alpha (h_t - h_s)

    Args:
        model: the student, a causal language model or a PEFT model of one, not wrapped for several devices.
        student: the completions after the student's prompts (`unisd.completions.completion_batch`).
        teacher: the same completions after the teacher's prompts.
        auxiliary, negative: the same after K other contexts, and after a wrong demonstration. What is given has its
            mechanism (agreement weights, contrastive term), and is read by the mixture that wants it.
        teacher_model: whose weights read everything but the student's prompt; None for the model itself as it is now.
        teacher_mixture: "self" (the teacher's context alone), "consensus", "contrastive" or "pmi".
        mixture_alpha: alpha > 0 of the last two.
        agreement: "token" or "sequence" weights from the auxiliary contexts; "none" for none: then they are for the
            consensus alone and cost no product of the head. `contrastive_weight=0` does that for the negative context
            of the mixture "contrastive".
        settings: of `unisd_kernels.unisd_loss` (`beta`, `temperature`, `clip_cap`, `feature_weight`, `num_items`, ...).

    Returns:
        `unisd_kernels.UniSDLoss`; `.loss` is the scalar to differentiate.

    Raises:
        ValueError, TypeError: a wrapped model, a view of other completions than the student's, a mixture without its
            views, views that nothing reads, a mixture under a soft cap, `pmi` where `teacher_model` has another head
            than the model, or what `unisd_loss` refuses.
    """
    for which, one in (("model", model), ("teacher_model", teacher_model)):
        if isinstance(one, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            raise ValueError(
                f"{which} is wrapped in {type(one).__name__}, past whose forward the gradients would not be averaged: "
                "use UniSDTrainer on several devices, or give model.module and average the gradients yourself"
            )
    _check_mixture(teacher_mixture, mixture_alpha, agreement, bool(auxiliary), negative is not None)
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
    check_softcap(teacher_mixture, scorer)
    if teacher_mixture == "pmi":
        check_common_head(
            model_head(scorer),
            model_head(model),
            "teacher_model has another than model; leave it out, or share the head",
        )
    with scoring_mode(scorer):
        teacher_head = model_head(scorer).detach()
        hidden = [hidden_rows(scorer, view) for _, view in named]
    # Autocast keeps 16-bit copies of the weights; those made without a graph must not serve the student's pass.
    torch.clear_autocast_cache()
    own, *others = hidden
    auxiliary_hidden, negative_hidden = tuple(others[: len(auxiliary)]), None if negative is None else others[-1]
    student_hidden, student_head = hidden_rows(model, student), model_head(model)
    views = Views(own, auxiliary_hidden, negative_hidden, student_hidden)
    parts = parts_of_teacher(teacher_mixture, mixture_alpha, views, teacher_head, student_head)
    # Views that are read for the mixture alone are not scored.
    if agreement == "none":
        auxiliary_hidden = ()
    else:
        settings["agreement"] = agreement
    if teacher_mixture == "contrastive" and settings.get("contrastive_weight") == 0:
        negative_hidden = None
    return unisd_loss(
        student_hidden,
        student_head,
        mixed(parts) if parts else own,
        teacher_head,
        student.target_ids,
        student.cu_seqlens,
        auxiliary_hidden=auxiliary_hidden,
        negative_hidden=negative_hidden,
        **settings,
    )


def _check_mixture(mixture: str, alpha: float, agreement: str, has_auxiliary: bool, has_negative: bool) -> None:
    """Raise unless each mixture has its views, and each view something that reads it."""
    check_choice("teacher_mixture", mixture, MIXTURES)
    check_number("mixture_alpha", alpha, low=0.0, open_low=True)
    check_choice("agreement", agreement, ("none", "token", "sequence"))
    for of, given, name in (("consensus", has_auxiliary, "auxiliary"), ("contrastive", has_negative, "negative")):
        if mixture == of and not given:
            raise ValueError(f"teacher_mixture={of!r} reads {name}, which is not given; give it, or another mixture")
    if agreement == "none" and has_auxiliary and mixture != "consensus":
        raise ValueError("auxiliary is given, but nothing reads it: leave it out, or set agreement='token'")
