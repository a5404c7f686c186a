"""A teacher that is a mixture of views: which, with which weights (docs/mixtures.md), and what cannot be one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from unisd.modules import verified_softcap
from unisd_kernels import LMHead, mix_hidden

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


def parts_of_teacher(
    mixture: str, alpha: float, views: Views, teacher_head: LMHead, student_head: LMHead
) -> list[Part]:
    """The views that are the teacher together, the teacher's own context first; none for the mixture "self".

    consensus     (h_t + sum_k h_k) / (K + 1)      the geometric mean of teacher and auxiliary contexts
    contrastive   h_t + alpha (h_t - h_n)          away from the negative context
    pmi           h_t + alpha (h_t - h_s)          away from what the student says without the context
    """
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


def check_softcap(mixture: str, scorer: nn.Module) -> None:
    """Raise ValueError for a mixture of views that a model with a soft cap reads."""
    softcap = None if mixture == "self" else verified_softcap(scorer)
    if softcap is not None:
        raise ValueError(
            f"teacher_mixture={mixture!r} mixes hidden states, but the logits of {type(scorer).__name__} have a soft "
            f"cap ({softcap:g}), behind which no hidden state is the mixture; set teacher_mixture='self'"
        )


def check_common_head(teacher: LMHead, student: LMHead, otherwise: str) -> None:
    """Raise ValueError unless the mixture with the student's own states has one head.

    Args:
        otherwise: whose head is another, and what to do.
    """
    if not teacher.is_same(student):
        raise ValueError(
            "teacher_mixture='pmi' mixes the teacher with the student's own states, which needs one head, but "
            f"{otherwise}"
        )
