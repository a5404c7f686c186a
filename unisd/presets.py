"""The recipes of UniSD by name: what each mechanism is set to when it is used alone, and together (`unisd_star`).

Source of the values: the launcher of UniSD (arXiv 2605.06597).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Values of the `UniSDConfig` fields of the same names; the defaults are those of plain self-distillation.

    A preset gives every field a value, also those of mechanisms it leaves off, so that turning one mechanism on
    beside a preset (`UniSDConfig(preset="sdft", agreement="token")`) gets that mechanism's values for use alone.

    Attributes:
        description: one line.
        divergence_weight: 0 trains on the other terms alone.
        agreement: "none", "token" or "sequence".
        agreement_gamma: how strongly disagreement lowers a weight.
        contrastive_weight: 0 turns the term, and the negative context, off.
        contrastive_margin: nats.
        feature_weight: 0 turns feature matching off.
        clip_cap: nats; 0 turns clipping off.
        ema: "none", or "auto" for the mode that fits the model ("adapter" with LoRA, else "full").
        ema_decay: weight of the old teacher at each update.
    """

    description: str
    divergence_weight: float = 1.0
    agreement: str = "none"
    agreement_gamma: float = 0.01
    contrastive_weight: float = 0.0
    contrastive_margin: float = 0.5
    feature_weight: float = 0.0
    clip_cap: float = 0.0
    ema: str = "none"
    ema_decay: float = 0.9


PRESETS: dict[str, Preset] = {
    "sdft": Preset("plain self-distillation: the divergence to the model itself under the richer context"),
    "agreement_token": Preset("tokens on which the auxiliary contexts disagree count less", agreement="token"),
    "agreement_sequence": Preset("sequences on which the auxiliary contexts disagree count less", agreement="sequence"),
    "ema": Preset("the teacher's weights are a moving average of the student's", ema="auto"),
    "contrastive": Preset("closer to the teacher than to a negative context, by a margin", contrastive_weight=0.1),
    "match_joint": Preset("divergence and feature matching", feature_weight=0.1),
    "match_repr": Preset("feature matching alone", divergence_weight=0.0, feature_weight=1.0),
    "clip": Preset("the divergence of a token is capped", clip_cap=10.0),
    "unisd_star": Preset(
        "UniSD*: moving-average teacher, feature matching, contrastive term and token-level agreement together",
        agreement="token",
        agreement_gamma=0.001,
        contrastive_weight=0.01,
        contrastive_margin=0.1,
        feature_weight=0.01,
        ema="auto",
        ema_decay=0.98,
    ),
}
"""Every preset by name."""


def get_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: no such preset; the message lists them.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(map(repr, PRESETS))}, got {name!r}")
    return PRESETS[name]
