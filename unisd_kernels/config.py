"""Settings and tensors of one `unisd_loss` call, checked once and passed whole to every backend."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch

from unisd_kernels.batch import Batch
from unisd_kernels.heads import LMHead

AgreementLevel = Literal["token", "sequence"]
AgreementStatistic = Literal["variance", "range"]
Normalization = Literal["sequence", "token"]
WeightNormalization = Literal["weighted", "count"]
ViewsDtype = Literal["int8"]


# An int may be larger than any float.
_LARGEST = sys.float_info.max


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_number(name: str, value: float, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False):
    """Raise unless `value` is a finite number in [low, high] (or ]low, high] with `open_low`)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    # Not math.isfinite: torch.compile may trace this with a symbol for the value.
    if not -_LARGEST <= value <= _LARGEST or value < low or value > high or (open_low and value == low):
        if math.isinf(low) and math.isinf(high):
            needs_grad = "finite"
        elif math.isinf(high):
            needs_grad = f"{'>' if open_low else '>='} {low:g}"
        else:
            needs_grad = f"in {']' if open_low else '['}{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {needs_grad}, got {value}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


# The settings that are names.
_CHOICES: dict[str, tuple[str, ...]] = {
    "agreement": get_args(AgreementLevel),
    "agreement_statistic": get_args(AgreementStatistic),
    "normalization": get_args(Normalization),
    "weight_normalization": get_args(WeightNormalization),
    "views_dtype": get_args(ViewsDtype),
}
# Of them, those that may be None.
_OPTIONAL = ("weight_normalization", "views_dtype")
_FLAGS = ("return_entropy", "return_statistics")
# In `LossConfig.encode`; no setting that may be None is ever negative.
_NONE = -1.0


@dataclass(frozen=True)
class LossConfig:
    """Hyper-parameters of `unisd_loss`; see its docstring for the meaning of each."""

    beta: float = 0.0
    temperature: float = 1.0
    clip_cap: float | None = None
    clip_quantile: float | None = None
    agreement: AgreementLevel = "token"
    agreement_statistic: AgreementStatistic = "variance"
    agreement_gamma: float = 0.01
    weight_normalization: WeightNormalization | None = None
    contrastive_weight: float = 0.1
    contrastive_margin: float = 0.5
    feature_weight: float = 0.0
    divergence_weight: float = 1.0
    normalization: Normalization = "sequence"
    return_entropy: bool = True
    return_statistics: bool = True
    views_dtype: ViewsDtype | None = None
    views_tolerance: float | None = None

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=0.0, high=1.0)
        check_number("temperature", self.temperature, low=0.0, open_low=True)
        if self.clip_cap is not None and self.clip_quantile is not None:
            raise ValueError("clip_cap and clip_quantile exclude each other: give one of them")
        if self.clip_cap is not None:
            check_number("clip_cap", self.clip_cap, low=0.0, open_low=True)
        if self.clip_quantile is not None:
            check_number("clip_quantile", self.clip_quantile, low=0.0, high=1.0)
        for name, choices in _CHOICES.items():
            if name not in _OPTIONAL or getattr(self, name) is not None:
                check_choice(name, getattr(self, name), choices)
        for name in ("agreement_gamma", "contrastive_weight", "feature_weight", "divergence_weight"):
            check_number(name, getattr(self, name), low=0.0)
        check_number("contrastive_margin", self.contrastive_margin)
        for name in _FLAGS:
            check_flag(name, getattr(self, name))
        if (self.views_dtype is None) != (self.views_tolerance is None):
            raise ValueError(
                "views_dtype and views_tolerance (the largest error of an agreement weight, say 0.05) go together, got "
                f"{self.views_dtype!r} and {self.views_tolerance!r}"
            )
        if self.views_tolerance is not None:
            check_number("views_tolerance", self.views_tolerance, low=0.0)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `unisd_loss`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def encode(self) -> list[float]:
        """The settings as numbers in the order of the fields, which an operator's schema can hold: a choice by its
        place among the choices, a flag as 0 or 1, None as -1."""

        def number(name: str, value: Any) -> float:
            if value is None:
                return _NONE
            return float(_CHOICES[name].index(value)) if name in _CHOICES else float(value)

        return [number(name, value) for name, value in self.arguments().items()]

    @classmethod
    def decode(cls, numbers: Sequence[float]) -> LossConfig:
        """The inverse of `encode`."""
        settings: dict[str, Any] = dict(zip((field.name for field in fields(cls)), numbers, strict=True))
        for name, choices in _CHOICES.items():
            settings[name] = None if settings[name] == _NONE else choices[int(settings[name])]
        for name in _FLAGS:
            settings[name] = bool(settings[name])
        for name in ("clip_cap", "clip_quantile", "views_tolerance"):
            settings[name] = None if settings[name] == _NONE else settings[name]
        return cls(**settings)

    @property
    def runs_divergence(self) -> bool:
        """Whether the divergence, with the weights of its tokens, is computed."""
        return self.return_statistics or self.divergence_weight > 0

    def runs_contrast(self, has_negative: bool) -> bool:
        """Whether the contrastive term is computed."""
        return has_negative and (self.return_statistics or self.contrastive_weight > 0)

    def resolved_weight_normalization(self, has_agreement: bool) -> WeightNormalization:
        """Dividing by sum(w) makes a sequence-level weight cancel, so there the default is the token count."""
        if self.weight_normalization is not None:
            return self.weight_normalization
        return "count" if has_agreement and self.agreement == "sequence" else "weighted"


@dataclass(frozen=True)
class LossInputs:
    """Tensors of `unisd_loss`, all with N packed rows (see its docstring)."""

    student_hidden: torch.Tensor  # [N, H_s]
    student_head: LMHead
    teacher_hidden: torch.Tensor  # [N, H_t]
    teacher_head: LMHead
    target_ids: torch.Tensor  # [N]
    cu_seqlens: torch.Tensor  # [B + 1]
    auxiliary_hidden: tuple[torch.Tensor, ...] = ()  # K times [N, H]
    auxiliary_head: LMHead | None = None
    negative_hidden: torch.Tensor | None = None  # [N, H]
    negative_head: LMHead | None = None
    token_weights: torch.Tensor | None = None  # [N]
    num_items: float | torch.Tensor | None = None
    weight_total: float | torch.Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `unisd_loss`; without those that are None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def heads(self) -> tuple[LMHead, LMHead, LMHead, LMHead]:
        """Heads of student, teacher, auxiliary and negative views; the teacher's where a view has none of its own."""
        auxiliary = self.teacher_head if self.auxiliary_head is None else self.auxiliary_head
        negative = self.teacher_head if self.negative_head is None else self.negative_head
        return self.student_head, self.teacher_head, auxiliary, negative

    @property
    def num_rows(self) -> int:
        return self.student_hidden.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    def share(
        self, normalization: Normalization, dtype: torch.dtype, batch: Batch | None = None
    ) -> float | torch.Tensor:
        """The share of all `num_items` that these rows are, or the batch they are in; without a row there is nothing
        to share."""
        counted = self if batch is None else batch
        if self.num_items is None or counted.num_rows == 0:
            return 1.0
        local = counted.num_sequences if normalization == "sequence" else counted.num_rows
        # A quotient of integers would be float32.
        return local / (self.num_items.to(dtype) if isinstance(self.num_items, torch.Tensor) else self.num_items)
