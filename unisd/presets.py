"""The recipes by name: what each mechanism is set to when it is used alone, and together (`unisd_star`); the same as
the paper ran them (`*_paper`); and the baselines.

Source of the values: the launcher of UniSD (arXiv 2605.06597); for `sdft` arXiv 2601.19897; for `mixture_alpha` arXiv
2305.14739 and 2309.09117.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Preset:
    """Values of the `UniSDConfig` fields of the same names; the defaults are those of plain self-distillation.

    A preset gives every field a value, also those of mechanisms it leaves off, so that turning one mechanism on
    beside a preset (`UniSDConfig(preset="plain", agreement="token")`) gets that mechanism's values for use alone.

    Attributes:
        description: one line.
        method: "unisd", or "sft": cross-entropy on the gold demonstration.
        divergence_weight: 0 trains on the other terms alone.
        beta: 0 forward KL, 1 reverse KL, between: generalized Jensen-Shannon divergence.
        agreement: "none", "token" or "sequence".
        agreement_gamma: how strongly disagreement lowers a weight.
        contrastive_weight: 0 turns the term, and the negative context, off.
        contrastive_margin: nats.
        feature_weight: 0 turns feature matching off.
        clip_cap: nats; 0 turns clipping off.
        teacher_mixture: what the teacher is made of: "self", "consensus", "contrastive" or "pmi" (docs/mixtures.md).
        mixture_alpha: how far the last two sharpen it.
        teacher: "self", or "base": the weights before training.
        ema: "none", or "auto" for the mode that fits the model ("adapter" with LoRA, else "full").
        ema_decay: weight of the old teacher at each update.
        sync_steps: optimizer steps between updates.
        normalization: "sequence" (mean of the sequences' token means), "token" (mean over all tokens).
        num_train_epochs, max_prompt_length, max_completion_length: of the run; a `max_prompt_length` of 0 is no limit.
    """

    description: str
    method: str = "unisd"
    divergence_weight: float = 1.0
    beta: float = 0.0
    agreement: str = "none"
    agreement_gamma: float = 0.01
    contrastive_weight: float = 0.0
    contrastive_margin: float = 0.5
    feature_weight: float = 0.0
    clip_cap: float = 0.0
    teacher_mixture: str = "self"
    mixture_alpha: float = 0.5
    teacher: str = "self"
    ema: str = "none"
    ema_decay: float = 0.9
    sync_steps: int = 10
    normalization: str = "sequence"
    num_train_epochs: float = 3.0
    max_prompt_length: int = 0
    max_completion_length: int = 512


_MECHANISMS: dict[str, Preset] = {
    "plain": Preset("plain self-distillation: forward KL to the model itself as it is, under the richer context"),
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

_OTHERS: dict[str, Preset] = {
    "agreement_strong": Preset(
        "token-level agreement that acts: weights from 1 down to 0.09, where the paper's stay above 0.9",
        agreement="token",
        agreement_gamma=1.0,
    ),
    "consensus": Preset(
        "the teacher is the geometric mean of teacher and auxiliary contexts", teacher_mixture="consensus"
    ),
    "contrastive_teacher": Preset(
        "the teacher is sharpened away from the negative context", teacher_mixture="contrastive"
    ),
    "pmi": Preset(
        "the teacher is sharpened away from what the student says without the context", teacher_mixture="pmi"
    ),
    "sft": Preset(
        "baseline: supervised fine-tuning, cross-entropy on the gold demonstration", method="sft", normalization="token"
    ),
    "sdft": Preset(
        "baseline SDFT (2601.19897): reverse KL to a moving average of the model, updated every step",
        beta=1.0,
        ema="auto",
        ema_decay=0.98,
        sync_steps=1,
    ),
    "gkd": Preset(
        "baseline GKD: generalized Jensen-Shannon divergence to the model before training", beta=0.5, teacher="base"
    ),
}


def _as_in_the_paper(name: str, preset: Preset) -> Preset:
    """The preset as the paper's launcher runs it. Its teacher is a frozen copy of the base in every mode (the moving
    average of the public code leaves LoRA's tensors out, so that it stays there); only `ema` alone keeps the average,
    which is what the paper means by it."""
    if name != "ema":
        preset = replace(preset, teacher="base", ema="none")
    return replace(
        preset,
        description=f"{name} as the paper ran it: {'a moving average' if name == 'ema' else 'the base'} as the teacher",
        num_train_epochs=1.0,
        max_prompt_length=3072,
        max_completion_length=1024,
    )


PAPER_SUFFIX = "_paper"

PRESETS: dict[str, Preset] = {
    **_MECHANISMS,
    **_OTHERS,
    **{f"{name}{PAPER_SUFFIX}": _as_in_the_paper(name, preset) for name, preset in _MECHANISMS.items()},
}
"""Every preset by name."""

PAPER_LORA = {
    "use_peft": True,
    "lora_r": 64,
    "lora_alpha": 128,
    "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
"""Settings of `trl.ModelConfig` that the `*_paper` presets take in `unisd train`."""


def get_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: no such preset; the message lists them.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(map(repr, PRESETS))}, got {name!r}")
    return PRESETS[name]


def preset_fields() -> set[str]:
    """Names of the `UniSDConfig` fields that a preset fills."""
    return {entry.name for entry in fields(Preset)} - {"description", "method"}


def is_paper(name: str) -> bool:
    """Whether the preset is one as the paper ran it."""
    return name.endswith(PAPER_SUFFIX)


def paper_micro_batch(name: str, num_parameters: int) -> int:
    """Micro-batch of the paper's launcher, accumulated 4 times: 16 up to 1B parameters, 8 up to 5B, 4 above; half of it
    for UniSD*, which reads twice as many views."""
    size = 16 if num_parameters < 1e9 else 8 if num_parameters < 5e9 else 4
    return size // 2 if name.startswith("unisd_star") else size


def table(width: int = 80) -> str:
    """Every preset with what it does, for a terminal."""
    import textwrap

    longest = max(map(len, PRESETS))
    lines = []
    for name, preset in PRESETS.items():
        first, *others = textwrap.wrap(preset.description, max(20, width - longest - 4))
        lines += [f"  {name:<{longest}}  {first}", *(f"  {'':<{longest}}  {other}" for other in others)]
    return "\n".join(lines)
