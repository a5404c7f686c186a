"""`UniSDConfig`: every setting of a UniSD run, on top of TRL's `DistillationConfig`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from transformers import SchedulerType
from trl import DistillationConfig
from trl.trainer.utils import get_config_model_id

from unisd.config_ranges import check_ranges
from unisd.contexts import FRAMES
from unisd.contexts.template import TeacherTemplate
from unisd.importance import check_importance
from unisd.liger import liger_settings
from unisd.mixture import MIXTURES, SHARPENED
from unisd.presets import get_preset, preset_fields
from unisd.rows import OVERLONG
from unisd.run.deepspeed import StartsDeepSpeed
from unisd.views import VIEW_PASSES, VIEW_SCORERS, check_view_scorer
from unisd_kernels import available
from unisd_kernels.config import LossConfig, check_choice, check_number

_EMA_MODES = ("none", "auto", "full", "adapter", "merged")


# With supervised fine-tuning: what a preset sets and acts; other settings that do not act, with their defaults.
_OF_SFT = {"normalization", "num_train_epochs", "max_prompt_length", "max_completion_length"}
_WITHOUT_TEACHER = {
    "agreement_fraction": 1.0,
    "batch_statistics": "micro",
    "clip_quantile": 0.0,
    "mask_truncated_completions": False,
    "teacher_template": None,
    "top_entropy_quantile": 1.0,
}


def _from_preset(help_text: str) -> Any:
    """A field that takes its value from the preset unless it is given."""
    return field(default=None, metadata={"help": f"{help_text} Default: from the preset."})


@dataclass
class UniSDConfig(StartsDeepSpeed, DistillationConfig):
    """Settings of `UniSDTrainer`.

    `preset` names a recipe (`unisd.presets.PRESETS`). The fields whose default is None take their value from it when
    the config is built, so anything given explicitly, in Python, on the command line or in YAML, beats the preset.
    After construction every field holds the value that is used. To go from one built config to another preset, build
    a new one: `dataclasses.replace` would carry the old values over as explicit ones.

    Everything of `trl.DistillationConfig` (rollouts, vLLM, batch sizes, logging, ...) works as there, except the
    `teacher_model_*` fields, which are refused: the teacher is the model itself. Defaults that differ from TRL's are
    the recipe's: forward KL (`beta=0`), temperature 0.7, learning rate 2e-5 with cosine decay and 10% warm-up, batches
    of 4 with 4 accumulation steps.

    Parameters:
        preset: one of `unisd.presets.PRESETS`.
        divergence_weight: weight of the divergence term, >= 0.
        agreement: "none", "token" or "sequence": weights from K auxiliary contexts (column `auxiliary_prompts`).
        agreement_gamma: >= 0.
        agreement_statistic: "variance" or "range" of the K log-probabilities.
        num_auxiliary: K >= 2; every row's `auxiliary_prompts` must hold as many.
        agreement_fraction: q in ]0, 1], the share of the sequences that are scored under the K contexts: those the
            teacher is least sure of (docs/training.md, "Selective agreement"). 1 is the paper.
        weight_normalization: "auto", "weighted" (divide by max(sum w, 1)) or "count" (by the number of tokens). Auto
            is "count" for sequence-level agreement, where "weighted" would cancel the weights, else "weighted".
        contrastive_weight: >= 0; above 0 needs the column `negative_prompt`.
        contrastive_margin: nats.
        feature_weight: >= 0.
        clip_cap: cap on a token's divergence in nats; 0 for none.
        clip_quantile: instead, cap at this quantile of the divergences; 0 for none.
        batch_statistics: over which tokens quantities of a batch are taken (the 0.95 quantile of token-level agreement,
            `clip_quantile`, with `normalization="token"` the sum of weights): "micro", those of the micro-batch, or
            "global", those of the optimizer step on all processes, so that the gradient does not depend on how it is
            cut (docs/training.md, "Gradient accumulation and several devices", with what it costs).
        teacher_mixture: what the teacher is, under one head (docs/mixtures.md): "self": the teacher's context alone;
            "consensus": the geometric mean of it and the K auxiliary contexts; "contrastive": sharpened away from the
            negative context, h_t + alpha (h_t - h_n); "pmi": away from the student without the context, h_t + alpha
            (h_t - h_s). Costs no product of the head, whatever K.
        mixture_alpha: alpha > 0 of the last two.
        teacher: "self": the student's current weights (or their moving average, see `ema`); "base": the weights before
            training.
        ema: the moving average that scores: "none", "full", "adapter", "merged", or "auto" ("adapter" for a PEFT model,
            else "full"). What each of them averages and costs: docs/training.md, "Teachers".
        ema_decay: in [0, 1].
        sync_steps: optimizer steps between updates of the average.
        normalization: "sequence": mean over sequences of their token means; "token": mean over all tokens.
        max_prompt_length: longest context (student's or any view's) in tokens. Nothing is ever truncated. 0 leaves
            only the model's own limit, for context and `max_completion_length` together.
        mask_truncated_completions: leave completions that were cut off at `max_completion_length` out of the loss.
        top_entropy_quantile: share of a micro-batch's tokens that count, those of the highest student entropy
            (at `temperature`); 1 for all.
        skip_first_tokens: first tokens of each completion that do not count.
        teacher_template, study_sentence: of the teacher's prompt where rows hold a `privileged_context`; see
            `unisd.contexts.template`.
        overlong: what becomes of rows with a longer context, before training starts: "drop" leaves them out and says
            how many and which; "error" refuses them.
        prompt_frame: where prompts and contexts that are strings are read: "chat" (in the user message of the
            tokenizer's chat template), "given" (outside of it), or "auto" ("chat" where there is a template); see
            docs/training.md, "One frame".
        drift_probe_every: optimizer steps between measurements of the drift from the base model
            (`unisd/drift_kl`, see `unisd.drift`), which is measured before the first and after the last step too; 0
            turns it off.
        drift_budget: bound on that drift, nats a token, kept by the learning rate and with LoRA by shrinking what was
            learned where it passed it; else the run stops there (docs/training.md, "A budget for the drift"). None for
            none.
        on_nonfinite: what a NaN or infinite loss or gradient does: "stop" raises FloatingPointError before the
            optimizer step, "skip" leaves that step out (docs/training.md, "When something is not finite").
        view_passes: how the teacher's views are run: "padded" (a pass a view), "packed" (all in one, without padding),
            "prefix" (and what rows share from their beginning once), "auto" ("prefix" where the model can; says once
            where it cannot). The same states but for rounding (docs/training.md, "Views").
        view_cache_bytes: bound on the keys and values of shared prefixes that are kept between updates of the weights.
        vllm_importance_sampling_correction: weight the divergence at each place by how much more probable the tokens
            before it are under the student than under vLLM, which sampled them in another precision (docs/vllm.md).
        vllm_importance_sampling_clip_max: bound on such a weight.
        view_scorer: who scores the auxiliary views: "local", or "server": one with the base model and vLLM's
            `prompt_logprobs`, for `teacher="base"` (docs/vllm.md).
        view_scorer_url, view_scorer_model: where, and the model's name there; None for the only one.
        view_scorer_concurrency: requests under way at a time.
        view_scorer_timeout, view_scorer_patience: seconds until an answer counts as failed, and for which a failed
            request is tried again (a restart of the server) before the run stops.
        merged_rollouts: sample with the adapter added to a copy of its base's weights, which are put back exactly;
            LoRA, with transformers. None does so on a CPU (docs/training.md, "Rollouts").
        profile: measure where a step's time and memory go (docs/training.md, "What a step costs").
        impl: implementation of the kernels by name (`unisd_kernels.available()`); None chooses.
        workspace_bytes: bound on the logits held at a time; None for the kernels' default.

    Raises:
        ValueError, TypeError: a value out of range, an unknown name, settings that exclude each other.
    """

    learning_rate: float = field(default=2e-5, metadata={"help": "The initial learning rate for AdamW."})
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine", metadata={"help": "The learning rate scheduler; see `transformers.SchedulerType`."}
    )
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Warm-up: a number of steps, or below 1 the share of all steps."}
    )
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Micro-batch size per device."})
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "Micro-batches per optimizer step."})
    temperature: float = field(
        default=0.7, metadata={"help": "Temperature of sampling, divergence and contrastive term (agreement uses 1)."}
    )
    beta: float | None = _from_preset(  # type: ignore[assignment]
        "0 forward KL, 1 reverse KL, between: generalized Jensen-Shannon divergence."
    )
    num_train_epochs: float | None = _from_preset("Number of training epochs.")  # type: ignore[assignment]
    max_completion_length: int | None = _from_preset("Most tokens of a completion.")

    preset: str = field(
        default="unisd_star",
        metadata={"help": "Recipe by name; `unisd presets` lists them. Explicit settings beat it."},
    )
    divergence_weight: float | None = _from_preset("Weight of the divergence term.")
    agreement: str | None = _from_preset("Agreement weights: none, token or sequence.")
    agreement_gamma: float | None = _from_preset("How strongly disagreement lowers a weight.")
    agreement_statistic: str = field(
        default="variance", metadata={"help": "Spread of the auxiliary log-probabilities: variance or range."}
    )
    num_auxiliary: int = field(default=3, metadata={"help": "Number K of auxiliary contexts per row."})
    agreement_fraction: float = field(
        default=1.0,
        metadata={"help": "Share of the most uncertain sequences that is scored under the auxiliary contexts, ]0, 1]."},
    )
    weight_normalization: str = field(
        default="auto", metadata={"help": "Denominator of the weighted mean: auto, weighted or count."}
    )
    contrastive_weight: float | None = _from_preset("Weight of the contrastive term; 0 turns it off.")
    contrastive_margin: float | None = _from_preset("Margin of the contrastive term in nats.")
    feature_weight: float | None = _from_preset("Weight of feature matching; 0 turns it off.")
    clip_cap: float | None = _from_preset("Cap on a token's divergence in nats; 0 turns it off.")
    clip_quantile: float = field(
        default=0.0, metadata={"help": "Cap a token's divergence at this quantile of them; 0 turns it off."}
    )
    batch_statistics: str = field(
        default="micro",
        metadata={"help": "Quantiles and sums of weights over: micro (a micro-batch) or global (an optimizer step)."},
    )
    teacher_mixture: str | None = _from_preset("What the teacher is made of: self, consensus, contrastive or pmi.")
    mixture_alpha: float | None = _from_preset("How far contrastive and pmi sharpen the teacher, above 0.")
    teacher: str | None = _from_preset("Teacher's weights: self (see ema) or base (before training).")
    ema: str | None = _from_preset("Moving-average teacher: none, auto, full, adapter or merged.")
    ema_decay: float | None = _from_preset("Weight of the old teacher at each update, in [0, 1].")
    sync_steps: int | None = _from_preset("Optimizer steps between updates of the average.")
    normalization: str | None = _from_preset("Reduction: sequence (mean of token means) or token (one global mean).")
    max_prompt_length: int | None = _from_preset("Longest context in tokens (see overlong); 0: the model's limit.")
    mask_truncated_completions: bool = field(
        default=False,
        metadata={"help": "Leave completions that did not end by max_completion_length out of the loss."},
    )
    top_entropy_quantile: float = field(
        default=1.0,
        metadata={"help": "Share of a micro-batch's tokens, those of the highest student entropy, that count, ]0, 1]."},
    )
    skip_first_tokens: int = field(default=0, metadata={"help": "First tokens of each completion that do not count."})
    teacher_template: str | None = field(
        default=None,
        metadata={"help": "Teacher's prompt of privileged_context: with {prompt}, {demonstration} and {study}."},
    )
    study_sentence: str | None = field(
        default=None, metadata={"help": "What stands for {study} in the teacher's template."}
    )
    overlong: str = field(
        default="drop",
        metadata={"help": "Rows with a context that is too long: drop (before training, with a count) or error."},
    )
    prompt_frame: str = field(
        default="auto",
        metadata={
            "help": "Prompts and contexts that are strings: chat (into the user message of the chat template), given "
            "(outside of it), or auto (chat if the tokenizer has a template)."
        },
    )
    drift_probe_every: int = field(
        default=50, metadata={"help": "Optimizer steps between measurements of the drift from the base; 0: never."}
    )
    drift_budget: float | None = field(
        default=None,
        metadata={"help": "Bound on the drift in nats a token, see docs/training.md; None for none."},
    )
    on_nonfinite: str = field(
        default="stop",
        metadata={"help": "A NaN or infinite loss or gradient: stop (before the optimizer step) or skip that step."},
    )
    view_passes: str = field(
        default="auto", metadata={"help": "Passes over the teacher's views: auto, padded, packed or prefix."}
    )
    view_cache_bytes: int = field(
        default=2**30, metadata={"help": "Bound in bytes on the keys and values of shared prefixes that are kept."}
    )
    vllm_importance_sampling_correction: bool = field(
        default=False, metadata={"help": "Weight each place by student over vLLM, of the tokens before it."}
    )
    vllm_importance_sampling_clip_max: float = field(
        default=3.0, metadata={"help": "Bound on the weight of the importance correction."}
    )
    view_scorer: str = field(
        default="local", metadata={"help": "Who scores the auxiliary views: local, or server (needs teacher=base)."}
    )
    view_scorer_url: str | None = field(
        default=None, metadata={"help": "The server, such as http://localhost:8000 (`vllm serve` of the base model)."}
    )
    view_scorer_model: str | None = field(
        default=None, metadata={"help": "The model's name there; None for the only one."}
    )
    view_scorer_concurrency: int = field(default=16, metadata={"help": "Requests to it that are under way at a time."})
    view_scorer_timeout: float = field(
        default=600.0, metadata={"help": "Seconds until an answer of it counts as failed."}
    )
    view_scorer_patience: float = field(
        default=600.0, metadata={"help": "Seconds for which a failed request is tried again before the run stops."}
    )
    merged_rollouts: bool | None = field(
        default=None,
        metadata={"help": "Sample with a LoRA adapter added to its base (memory: a copy of it); None: on a CPU."},
    )
    profile: bool = field(
        default=False,
        metadata={"help": "Measure where a step's time and memory go: a table at the end, profile.png, profile.json."},
    )
    impl: str | None = field(default=None, metadata={"help": "Implementation of the kernels by name; None chooses."})
    workspace_bytes: int | None = field(
        default=None, metadata={"help": "Bound in bytes on the logits held at a time; None for the default."}
    )

    def __post_init__(self) -> None:
        self._resolve_preset()
        self._validate()
        if self.use_liger_kernel:
            self.liger_kernel_config = liger_settings(self.liger_kernel_config)
        super().__post_init__()

    @property
    def is_supervised(self) -> bool:
        """Whether completions are the rows' demonstrations, and the loss their cross-entropy (preset "sft")."""
        return get_preset(self.preset).method == "sft"

    @property
    def uses_agreement(self) -> bool:
        """Whether the agreement of auxiliary contexts gives weights."""
        return self.agreement != "none"

    @property
    def uses_contrastive(self) -> bool:
        """Whether the loss has the contrastive term."""
        return bool(self.contrastive_weight)

    @property
    def divides_by_weight_total(self) -> bool:
        """Whether the divergence is divided by the sum of the weights of all tokens."""
        return self.normalization == "token" and self.resolved_weight_normalization == "weighted"

    @property
    def _has_batch_quantities(self) -> bool:
        weighs = self.uses_agreement and self.divides_by_weight_total
        return self.agreement == "token" or bool(self.clip_quantile) or weighs

    @property
    def uses_global_statistics(self) -> bool:
        """Whether there are quantities over the optimizer step, for which its views are read beforehand."""
        return self.batch_statistics == "global" and self._has_batch_quantities

    @property
    def reads_auxiliary(self) -> bool:
        """Whether rows need `auxiliary_prompts`."""
        return self.uses_agreement or self.teacher_mixture == "consensus"

    @property
    def reads_negative(self) -> bool:
        """Whether rows need a `negative_prompt`."""
        return self.uses_contrastive or self.teacher_mixture == "contrastive"

    @property
    def resolved_weight_normalization(self) -> str:
        """Denominator of the weighted mean, "weighted" or "count"; by the kernels' own rule, also where the weights are
        computed before (`agreement_fraction`)."""
        chosen: Any = None if self.weight_normalization == "auto" else self.weight_normalization
        level: Any = self.agreement if self.uses_agreement else "token"
        config = LossConfig(agreement=level, weight_normalization=chosen)
        return config.resolved_weight_normalization(self.uses_agreement)

    def loss_settings(self) -> dict[str, Any]:
        """Keyword arguments of `unisd_kernels.unisd_loss` that do not change during a run."""
        return {
            "beta": self.beta,
            "temperature": self.temperature,
            "clip_cap": self.clip_cap or None,
            "clip_quantile": self.clip_quantile or None,
            "agreement": self.agreement if self.uses_agreement else "token",
            "agreement_statistic": self.agreement_statistic,
            "agreement_gamma": self.agreement_gamma,
            "weight_normalization": self.resolved_weight_normalization,
            "contrastive_weight": self.contrastive_weight,
            "contrastive_margin": self.contrastive_margin,
            "feature_weight": self.feature_weight,
            "divergence_weight": self.divergence_weight,
            "normalization": self.normalization,
            # A term of weight 0 is not paid for: feature matching alone needs no logits.
            "return_statistics": False,
            "impl": self.impl,
            "workspace_bytes": self.workspace_bytes,
        }

    def _resolve_preset(self) -> None:
        preset = get_preset(self.preset)
        if self.clip_quantile and self.clip_cap is None:
            self.clip_cap = 0.0  # the user's quantile takes the place of the preset's constant cap
        given = {name for name in preset_fields() if getattr(self, name) is not None}
        changed = {name for name in given if getattr(self, name) != getattr(preset, name)}
        for name in preset_fields() - given:
            setattr(self, name, getattr(preset, name))
        # As the limit is known further on: None for none.
        self.max_prompt_length = self.max_prompt_length or None
        if preset.method == "sft":
            self._refuse_teachers(changed)
        self._warn_about_unused(changed)

    def _refuse_teachers(self, changed: set[str]) -> None:
        """Raise ValueError for settings of a teacher beside supervised fine-tuning, which has none."""
        given = sorted(changed - _OF_SFT)
        given += [name for name, idle in _WITHOUT_TEACHER.items() if getattr(self, name) != idle]
        if given:
            raise ValueError(
                f"{given[0]}={getattr(self, given[0])!r} has no effect with preset={self.preset!r}, whose loss is the "
                "cross-entropy of the demonstrations: there is no teacher and nothing is sampled"
            )

    def _warn_about_unused(self, changed: set[str]) -> None:
        """Say which settings were given, differ from the preset and still do nothing."""
        idle: dict[str, str] = {}
        if self.agreement == "none":
            idle["agreement_gamma"] = "agreement='none'"
        if self.contrastive_weight == 0:
            idle["contrastive_margin"] = "contrastive_weight=0"
        if self.teacher_mixture not in SHARPENED:
            idle["mixture_alpha"] = f"teacher_mixture={self.teacher_mixture!r}"
        if self.ema == "none":
            idle["ema_decay"] = "ema='none'"
        for name in sorted(changed & idle.keys()):
            warnings.warn(f"{name}={getattr(self, name)} has no effect with {idle[name]}", stacklevel=5)
        if self.agreement == "none" and self.agreement_fraction != 1.0:
            warnings.warn("agreement_fraction has no effect with agreement='none'", stacklevel=5)
        if self.batch_statistics == "global" and not self._has_batch_quantities:
            what = f"agreement={self.agreement!r}, normalization={self.normalization!r} and clip_quantile=0"
            warnings.warn(f"batch_statistics='global' has no effect with {what}", stacklevel=5)

    def _validate(self) -> None:
        check_choice("agreement", self.agreement, ("none", "token", "sequence"))
        check_choice("agreement_statistic", self.agreement_statistic, ("variance", "range"))
        check_choice("weight_normalization", self.weight_normalization, ("auto", "weighted", "count"))
        check_choice("teacher_mixture", self.teacher_mixture, MIXTURES)
        check_choice("teacher", self.teacher, ("self", "base"))
        check_choice("ema", self.ema, _EMA_MODES)
        check_choice("on_nonfinite", self.on_nonfinite, ("stop", "skip"))
        if self.impl is not None:
            check_choice("impl", self.impl, tuple(available("cpu")))
        check_choice("batch_statistics", self.batch_statistics, ("micro", "global"))
        check_choice("normalization", self.normalization, ("sequence", "token"))
        check_choice("view_passes", self.view_passes, VIEW_PASSES)
        check_choice("view_scorer", self.view_scorer, VIEW_SCORERS)
        check_choice("overlong", self.overlong, OVERLONG)
        check_choice("prompt_frame", self.prompt_frame, FRAMES)
        for name in ("divergence_weight", "agreement_gamma", "contrastive_weight", "feature_weight", "clip_cap"):
            check_number(name, getattr(self, name), low=0.0)
        check_number("contrastive_margin", self.contrastive_margin)  # type: ignore[arg-type]
        check_number("clip_quantile", self.clip_quantile, low=0.0, high=1.0)
        check_number("agreement_fraction", self.agreement_fraction, low=0.0, high=1.0, open_low=True)
        check_number("mixture_alpha", self.mixture_alpha, low=0.0, open_low=True)  # type: ignore[arg-type]
        check_number("ema_decay", self.ema_decay, low=0.0, high=1.0)  # type: ignore[arg-type]
        if self.drift_budget is not None:
            check_number("drift_budget", self.drift_budget, low=0.0, open_low=True)
        check_number("temperature", self.temperature, low=0.0, open_low=True)
        check_number("view_scorer_timeout", self.view_scorer_timeout, low=0.0, open_low=True)
        check_number("view_scorer_patience", self.view_scorer_patience, low=0.0)
        check_ranges(self)
        check_number("top_entropy_quantile", self.top_entropy_quantile, low=0.0, high=1.0, open_low=True)
        TeacherTemplate.of(self)  # refuses what is no template
        for name, low in (
            ("num_auxiliary", 1),
            ("sync_steps", 1),
            ("drift_probe_every", 0),
            ("skip_first_tokens", 0),
            ("view_cache_bytes", 0),
            ("view_scorer_concurrency", 1),
            ("max_completion_length", 1),
        ):
            _check_integer(name, getattr(self, name), low)
        if self.agreement != "none" and self.num_auxiliary == 1:
            raise ValueError(
                f"agreement={self.agreement!r} with num_auxiliary=1: one context has no {self.agreement_statistic}, so "
                "every weight is 1; set num_auxiliary to 2 or more, or agreement='none'"
            )
        if self.teacher_mixture == "consensus" and self.uses_agreement and self.agreement_fraction != 1.0:
            raise ValueError(
                f"teacher_mixture='consensus' reads every sequence under the auxiliary contexts, of which "
                f"agreement_fraction={self.agreement_fraction} would leave some out; set agreement_fraction to 1"
            )
        if self.uses_global_statistics and self.top_entropy_quantile < 1.0:
            raise ValueError(
                f"top_entropy_quantile={self.top_entropy_quantile} chooses tokens in each micro-batch, so that with "
                "batch_statistics='global' the gradient would still depend on its size; set one of them to its default"
            )
        for name in ("max_prompt_length", "workspace_bytes"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 1)
        if self.drift_budget is not None and not self.drift_probe_every:
            raise ValueError(
                f"drift_budget={self.drift_budget} needs the drift measured: set drift_probe_every above 0"
            )
        if self.clip_cap and self.clip_quantile:
            raise ValueError(
                f"clip_cap={self.clip_cap} and clip_quantile={self.clip_quantile} exclude each other: set one to 0"
            )
        if self.teacher == "base" and self.ema != "none":
            raise ValueError(
                f"teacher='base' is a fixed teacher and cannot be a moving average (ema={self.ema!r}); set ema='none'"
            )
        check_view_scorer(self)
        check_importance(self)
        if not (self.divergence_weight or self.contrastive_weight or self.feature_weight):
            raise ValueError(
                "divergence_weight, contrastive_weight and feature_weight are all 0: there is nothing to train on"
            )
        for name in ("teacher_model_name_or_path", "teacher_model_revision", "teacher_model_init_kwargs"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} was given, but UniSD distils a model from itself: its teacher is "
                    "set with `teacher` and `ema`. Use trl.DistillationTrainer for another model as the teacher"
                )


def config_for(model: Any, args: UniSDConfig | None) -> UniSDConfig:
    """The given config, or the default one for a model.

    Args:
        model: a model, or the name of one.

    Raises:
        TypeError: `args` of another class.
    """
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        args = UniSDConfig(f"{name.split('/')[-1]}-UniSD")
    if not isinstance(args, UniSDConfig):
        raise TypeError(f"args must be a UniSDConfig, got {type(args).__name__}")
    return args


def _check_integer(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name} must be >= {low}, got {value}")
