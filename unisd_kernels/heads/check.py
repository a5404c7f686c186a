"""Scale and soft cap that a model puts behind its head: candidates from its configuration, judged by its own logits.

    log softmax(softcap_c(a (h W^T + b)))  against  log softmax(model(ids).logits)

Names in a configuration are hints and nothing more: a class may ignore the field it inherits, divide where another
multiplies, or do something else between backbone and logits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from unisd_kernels.heads.causal_model import causal_model, is_sharded, text_config
from unisd_kernels.heads.probe import Probe, probe

if TYPE_CHECKING:
    from unisd_kernels.heads.head import LMHead

# A slice of the weight in float64 takes at most this much.
_SLICE_BYTES = 32 << 20
# Fields that are a cap on logits (attention and gates have theirs, with other names), and that are a scale of them.
_CAP = re.compile(r"soft_?cap")
_NO_CAP = re.compile(r"attn|attention|router|gate|mlp|expert")
_SCALE = re.compile(r"(logit|output|head|mup|unembed).*(scal|mult)|(scal|mult).*(logit|output|head|unembed)")
# Of fields that are a scale, those by which a model usually divides.
_DIVISOR = re.compile(r"^logits_scaling$|mup_width_multiplier$")
# Conventions that only the kind of model tells: one multiplies by `logits_scaling`, and MPT ignores its `logit_scale`.
_MULTIPLIES = frozenset({"hyperclovax", "hyperclovax_vision_v2"})
_IGNORES_SCALE = frozenset({"mpt"})


@dataclass(frozen=True)
class Form:
    """Transform behind the product: `z = softcap(logit_scale * (h W^T + b))` over `vocab_size` columns."""

    logit_scale: float
    softcap: float | None
    vocab_size: int | None
    source: str = ""

    def __str__(self) -> str:
        cap = "" if self.softcap is None else f", softcap={self.softcap:.6g}"
        source = f" ({self.source})" if self.source else ""
        return f"logit_scale={self.logit_scale:.6g}{cap}{source}"


def form_of(model: Any, head: LMHead, verify: bool) -> Form:
    """Scale and cap of a model's head.

    Args:
        head: its weight and bias, or this rank's slice of them; and `vocab_size`, the columns to compare, None for as
            many as the model's own forward gives.
        verify: run the model and choose what agrees with it; else the first guess from the configuration.

    Raises:
        ValueError: nothing in the configuration agrees with the model's own logits, or it cannot be run.
    """
    vocab_size, shard = head.vocab_size, head.shard
    guesses = [
        Form(scale, cap, vocab_size, ", ".join(filter(None, (scale_source, cap_source))))
        for cap, cap_source in _caps(model)
        for scale, scale_source in _scales(model, head.weight)
    ]
    if not verify:
        return guesses[0]
    if is_sharded(model) and shard is None:
        raise ValueError(
            "the head of a sharded model (FSDP, ZeRO-3, tensor parallelism) cannot be checked against the model's own "
            "logits: read it before it is sharded, or pass verify=False to believe the configuration"
        )
    seen = probe(model, head)
    columns = _columns(model, seen, head)
    comparison = _Comparison.of(seen, head, columns)
    if vocab_size is None and columns < head.num_columns:
        vocab_size = columns
    for guess in guesses:
        if comparison.agrees(guess):
            return Form(guess.logit_scale, guess.softcap, vocab_size, guess.source)
    raise ValueError(_explanation(model, comparison, guesses[0], seen, head))


def _columns(model: Any, seen: Probe, head: LMHead) -> int:
    columns, rows = seen.logits.shape[1], head.num_rows
    wanted = columns if head.vocab_size is None else head.vocab_size
    if not 0 < wanted <= min(columns, rows):
        raise ValueError(
            f"{type(causal_model(model)).__name__} makes {columns} logits a token and its head has {rows} "
            f"rows, so vocab_size={head.vocab_size} cannot be checked; vocab_size must not exceed either"
        )
    return wanted


class _Comparison:
    """The model's own logits beside raw products of the same hidden states, over the columns that count.

    Two roundings are told from a mistake by the dtype: a product, a bias, a scale and a cap, each rounded to the
    model's dtype with unit roundoff u, move a logit by at most `8 u |z|`, and hidden states rounded once more (where
    they, not the logits, are scaled) by about u times the length of the products' terms, `sqrt(sum_i (h_i w_i)^2)`,
    of which four times covers every one of a million columns. What the product itself loses on this device, with its
    accumulators and TF32, is measured.
    """

    def __init__(self, model: torch.Tensor, raw: torch.Tensor, noise: torch.Tensor, roundoff: float, num_natural: int):
        self.model = model  # [rows, V] float64
        self.raw = raw  # [rows, V] float64, h W^T + b
        self.noise = noise  # [rows, V] absolute error to expect of the model's raw products
        self.roundoff = roundoff
        self.num_natural = num_natural

    @classmethod
    def of(cls, seen: Probe, head: LMHead, columns: int) -> _Comparison:
        """Over the head's first columns; the ranks of a vocabulary multiply their own and tell each other."""
        here = columns if head.shard is None else head.shard.count_below(columns)
        weight, bias = head.weight.detach()[:here], None if head.bias is None else head.bias.detach()[:here]
        hidden = seen.hidden
        dtypes = {seen.logits.dtype, hidden.dtype, weight.dtype, *([seen.autocast] if seen.autocast else [])}
        # Functions such as tanh are a few units off in float32: no finer than 2^-20.
        roundoff = max(max(torch.finfo(dtype).eps for dtype in dtypes) / 2, 2.0**-20)
        # MPS has no float64.
        device = torch.device("cpu") if weight.device.type == "mps" else weight.device
        wide = hidden.to(device, torch.float64)
        raw = torch.empty(hidden.shape[0], here, dtype=torch.float64, device=device)
        noise = torch.empty_like(raw)
        step = max(1, _SLICE_BYTES // (8 * weight.shape[1]))
        for start in range(0, here, step):
            part = weight[start : start + step]
            wide_part = part.to(device, torch.float64)
            out = raw[:, start : start + step]
            torch.mm(wide, wide_part.T, out=out)
            with torch.no_grad(), torch.autocast(hidden.device.type, seen.autocast, enabled=seen.autocast is not None):
                native = functional.linear(hidden.to(part.dtype), part)
            lost = (native.to(device, torch.float64) - out).abs().amax(1, keepdim=True)
            terms = torch.mm(wide.square(), wide_part.square().T).sqrt()
            noise[:, start : start + step] = 4 * roundoff * terms + 2 * lost
        if bias is not None:
            raw += bias.to(device, torch.float64)
        if head.shard is not None:
            raw, noise = (head.shard.gather_columns(values, columns) for values in (raw, noise))
        model = seen.logits[:, :columns].to(device, torch.float64)
        return cls(model, raw, noise, roundoff, seen.num_natural)

    def logits(self, form: Form) -> torch.Tensor:
        scaled = self.raw * form.logit_scale
        return scaled if form.softcap is None else form.softcap * torch.tanh(scaled / form.softcap)

    def agrees(self, form: Form) -> bool:
        """Whether the log-probabilities differ by no more than rounding, on every row."""
        ours = self.logits(form)
        allowed = 8 * self.roundoff * ours.abs() + self.noise * abs(form.logit_scale)
        if form.softcap is not None:
            # The cap passes on what its slope lets through, and rounds its argument's ratio.
            slope = 1.0 - (ours / form.softcap).square()
            allowed = 8 * self.roundoff * ours.abs() + self.noise * abs(form.logit_scale) * (slope + 0.05)
        # A log-probability also has the error of its log-sum-exp, the mean of its terms' own.
        allowed = allowed + (ours.softmax(-1) * allowed).sum(-1, keepdim=True)
        return bool((self._difference(ours) <= allowed).all())

    def differs_by(self, form: Form) -> tuple[float, float]:
        """Largest difference of a log-probability in nats: on the model's own states, and on all."""
        difference = self._difference(self.logits(form))
        return float(difference[: self.num_natural].max()), float(difference.max())

    def _difference(self, ours: torch.Tensor) -> torch.Tensor:
        return (self.model.log_softmax(-1) - ours.log_softmax(-1)).abs()

    def fitted(self) -> Form | None:
        """The scale, or scale and cap, that explains the model's logits, or None."""
        raw = self.raw - self.raw.mean(-1, keepdim=True)
        model = self.model - self.model.mean(-1, keepdim=True)
        # The made-up rows come in two halves, the first of which no cap in use bends by much.
        scale = _least_squares(raw, model)
        plain = Form(scale, None, None)
        if scale and self.agrees(plain):
            return plain
        for cap in self._cap_candidates():
            inner = torch.atanh((self.model / cap).clamp(-1 + 1e-3, 1 - 1e-3)) * cap
            unbent = (self.model / cap).abs() < 0.8
            scale = _least_squares(self.raw * unbent, inner * unbent)
            form = Form(scale, cap, None)
            if scale and self.agrees(form):
                return form
        return None

    def _cap_candidates(self) -> Iterator[float]:
        """A cap just above the largest logit: a saturated row shows it."""
        largest = float(self.model.abs().max())
        if 0 < largest < 1e4:
            yield float(f"{largest:.3g}")
            yield float(math.ceil(largest))
            yield largest * (1 + self.roundoff)


def _least_squares(x: torch.Tensor, y: torch.Tensor) -> float:
    """`s` with the smallest sum of squares of `y - s x`, rounded to the digits that show."""
    square = float((x * x).sum())
    return float(f"{float((x * y).sum()) / square:.4g}") if square > 0 else 0.0


def _explanation(
    model: Any,
    comparison: _Comparison,
    guess: Form,
    seen: Probe,
    head: LMHead,
) -> str:
    name = type(causal_model(model)).__name__
    if not bool(torch.isfinite(comparison.model).all()):
        return (
            f"{name}'s own logits are not finite, or it masks columns of its vocabulary, so its head is not "
            "`softcap(scale * (h W^T + b))` and cannot be used"
        )
    own, far = comparison.differs_by(guess)
    start = (
        f"the head of {name} read as {guess} differs from the model's own log-probabilities by up to {own:.3g} nats "
        f"({far:.3g} on larger hidden states)"
    )
    fitted = comparison.fitted()
    if fitted is not None:
        cap = "" if fitted.softcap is None else f" and a softcap of {fitted.softcap:.6g}"
        cap_argument = "" if fitted.softcap is None else f", softcap={fitted.softcap:.6g}"
        return (
            f"{start}. A logit_scale of {fitted.logit_scale:.6g}{cap} explains it: LMHead(weight, bias, "
            f"logit_scale={fitted.logit_scale:.6g}{cap_argument}), or give the model's config such a field"
        )
    entered = seen.head_input
    if entered is not None and entered.shape == seen.hidden[: seen.num_natural].shape:
        inside = Probe(entered, seen.logits[: seen.num_natural], seen.num_natural, None, seen.autocast)
        explained = _Comparison.of(inside, head, comparison.raw.shape[1])
        if explained.agrees(Form(1.0, None, None)):
            return (
                f"{start}. The model changes the hidden states between its backbone and its head (as BERT's dense "
                "layer and norm do), so the backbone's states are not those that enter the head"
            )
    return (
        f"{start}. No logit_scale or softcap explains it: the model computes its logits otherwise than by "
        "`softcap(scale * (h W^T + b))`, so no LMHead fits it"
    )


def _caps(model: Any) -> list[tuple[float | None, str]]:
    """Soft caps, the likeliest first."""
    found: list[tuple[float | None, str]] = []
    for name, value in _numbers(model):
        if _CAP.search(name) and not _NO_CAP.search(name) and value > 0:
            found.append((value, f"config.{name}"))
    return _distinct([*found, (None, "")])


def _scales(model: Any, weight: torch.Tensor) -> list[tuple[float, str]]:
    """Scales, the likeliest first."""
    config = text_config(model)
    kind = getattr(config, "model_type", "")
    likely: list[tuple[float, str]] = []
    others: list[tuple[float, str]] = []
    for name, value in _numbers(model):
        if value == 0 or not _SCALE.search(name) or _CAP.search(name):
            continue
        times, over = (value, f"config.{name}"), (1.0 / value, f"1 / config.{name}")
        divides = _DIVISOR.search(name) is not None and kind not in _MULTIPLIES
        (others if kind in _IGNORES_SCALE else likely).append(over if divides else times)
        others.append(times if divides else over)
    size = weight.shape[1]
    if getattr(config, "logit_scale", None) == "inv_sqrt_d_model":
        others.append((size**-0.5, "config.logit_scale"))
    if isinstance(base := getattr(config, "dim_model_base", None), int) and base > 0:
        others.append((base / size, "config.dim_model_base / hidden_size"))
    return _distinct([*likely, (1.0, ""), *others])


def _numbers(model: Any) -> Iterator[tuple[str, float]]:
    """Fields of the configuration that are finite numbers: of the text part first, then of the whole."""
    for config in (text_config(model), model.config):
        values = dict(config.to_dict() if hasattr(config, "to_dict") else vars(config))
        # A property (MiniCPM3) is not among the fields.
        values.setdefault("logits_scaling", getattr(config, "logits_scaling", None))
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                yield name, float(value)


def _distinct(pairs: list[Any]) -> list[Any]:
    values: dict[Any, str] = {}
    for value, source in pairs:
        values.setdefault(value, source)
    return list(values.items())
