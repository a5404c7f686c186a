"""A teacher that is a mixture of views: which, with which weights (docs/mixtures.md), and what cannot be one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from unisd.head import gathered_head
from unisd.modules import model_head, verified_softcap
from unisd_kernels import LMHead, mix_hidden

if TYPE_CHECKING:
    from unisd.config import UniSDConfig
    from unisd.teachers import Teacher

MIXTURES = ("self", "consensus", "contrastive", "pmi")
"""Values of `UniSDConfig.teacher_mixture`."""
SHARPENED = ("contrastive", "pmi")
"""Those that `mixture_alpha` acts on."""


class Part(NamedTuple):
    """One view of a mixture.

    Attributes:
        name: as messages call it.
        hidden: [N, H].
        head: that it is scored with.
        weight: its power in the product.
    """

    name: str
    hidden: torch.Tensor
    head: LMHead
    weight: float


class Views(NamedTuple):
    """Hidden states [N, H] of the same tokens, as far as a mixture may want them; the student's are of its own pass."""

    teacher: torch.Tensor
    auxiliary: tuple[torch.Tensor, ...]
    negative: torch.Tensor | None
    student: torch.Tensor


def parts_of_teacher(args: UniSDConfig, views: Views, teacher_head: LMHead, student_head: LMHead) -> list[Part]:
    """The views that are the teacher together, the teacher's own context first; none for `teacher_mixture="self"`.

    consensus     (h_t + sum_k h_k) / (K + 1)      the geometric mean of teacher and auxiliary contexts
    contrastive   h_t + alpha (h_t - h_n)          away from the negative context
    pmi           h_t + alpha (h_t - h_s)          away from what the student says without the context
    """
    mixture, alpha = args.teacher_mixture, float(args.mixture_alpha or 0.0)
    if mixture == "self":
        return []
    if mixture == "consensus":
        share = 1.0 / (1 + len(views.auxiliary))
        others = [Part(f"auxiliary context {k}", h, teacher_head, share) for k, h in enumerate(views.auxiliary)]
        return [Part("the teacher's own context", views.teacher, teacher_head, share), *others]
    own = Part("the teacher's own context", views.teacher, teacher_head, 1.0 + alpha)
    if mixture == "pmi":
        return [own, Part("the student", views.student.detach(), student_head, -alpha)]
    assert views.negative is not None
    return [own, Part("the negative context", views.negative, teacher_head, -alpha)]


@torch.no_grad()
def mixed(parts: list[Part]) -> torch.Tensor:
    """[N, H], the one hidden state of all parts."""
    return mix_hidden([p.hidden for p in parts], [p.weight for p in parts], [p.head for p in parts])


def check_mixture(args: UniSDConfig, student: nn.Module, teacher: Teacher) -> None:
    """Raise ValueError for a mixture that is no hidden state of this model: under a soft cap, or under two heads.

    Args:
        student: the model, unwrapped, whose head has been verified.
        teacher: of the run.
    """
    if args.teacher_mixture == "self":
        return
    softcap = verified_softcap(student)
    if softcap is not None:
        raise ValueError(
            f"teacher_mixture={args.teacher_mixture!r} mixes hidden states, but the logits of "
            f"{type(student).__name__} have a soft cap ({softcap:g}), behind which no hidden state is the mixture; "
            "set teacher_mixture='self'"
        )
    if args.teacher_mixture != "pmi":
        return
    with teacher.scoring(student), gathered_head(student):
        head = teacher.head(student)
    with gathered_head(student):
        if head is None or head.is_same(model_head(student)):
            return
    raise ValueError(
        "teacher_mixture='pmi' mixes the teacher with the student's own states, which needs one head, but the "
        f"teacher ({teacher.mode}) has another than the student, whose head is trained; use LoRA without the head, "
        "freeze the head, or set teacher='self' and ema='none'"
    )
