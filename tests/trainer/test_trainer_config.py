"""Presets, what beats them, parsing, validation."""

import subprocess
import sys
import warnings

import pytest
import yaml
from trl import TrlParser

from tests.trainer import tiny_run
from unisd.config import UniSDConfig
from unisd.presets import PRESETS

RECIPE = {  # the launcher of the paper's code
    "plain": {"agreement": "none", "ema": "none", "contrastive_weight": 0, "feature_weight": 0, "clip_cap": 0},
    "agreement_token": {"agreement": "token", "agreement_gamma": 0.01, "num_auxiliary": 3},
    "agreement_sequence": {"agreement": "sequence", "agreement_gamma": 0.01, "ema": "none"},
    "ema": {"ema": "auto", "ema_decay": 0.9, "sync_steps": 10, "agreement": "none"},
    "contrastive": {"contrastive_weight": 0.1, "contrastive_margin": 0.5, "ema": "none"},
    "match_joint": {"feature_weight": 0.1, "divergence_weight": 1.0},
    "match_repr": {"feature_weight": 1.0, "divergence_weight": 0.0},
    "clip": {"clip_cap": 10.0, "divergence_weight": 1.0},
    "agreement_strong": {"agreement": "token", "agreement_gamma": 1.0, "ema": "none"},
    "consensus": {"teacher_mixture": "consensus", "agreement": "none", "contrastive_weight": 0},
    "contrastive_teacher": {"teacher_mixture": "contrastive", "mixture_alpha": 0.5, "contrastive_weight": 0},
    "pmi": {"teacher_mixture": "pmi", "mixture_alpha": 0.5, "ema": "none", "teacher": "self"},
    "sft": {"divergence_weight": 1.0},
    "sdft": {"beta": 1.0, "ema": "auto", "ema_decay": 0.98, "sync_steps": 1, "agreement": "none", "teacher": "self"},
    "gkd": {"beta": 0.5, "teacher": "base", "ema": "none"},
    "unisd_star": {
        "agreement": "token",
        "agreement_gamma": 0.001,
        "ema": "auto",
        "ema_decay": 0.98,
        "sync_steps": 10,
        "contrastive_weight": 0.01,
        "contrastive_margin": 0.1,
        "feature_weight": 0.01,
        "clip_cap": 0,
        "divergence_weight": 1.0,
    },
}


PAPER = {"num_train_epochs": 1.0, "max_prompt_length": 3072, "max_completion_length": 1024}


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_holds_the_recipe(tmp_path, preset):
    args = UniSDConfig(str(tmp_path), use_cpu=True, preset=preset)
    name = preset.removesuffix("_paper")
    expected = RECIPE[name]
    if preset != name:
        expected = {**expected, **PAPER}
        if name != "ema":
            expected |= {"teacher": "base", "ema": "none"}
            expected.pop("sync_steps", None)
            expected.pop("ema_decay", None)
    assert {key: getattr(args, key) for key in expected} == expected
    assert args.beta == {"sdft": 1.0, "gkd": 0.5}.get(name, 0.0)
    assert (args.temperature, args.learning_rate, args.warmup_steps, args.top_p) == (0.7, 2e-5, 0.1, 1.0)
    assert (args.max_grad_norm, args.seed) == (1.0, 42)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (4, 4)
    assert args.lr_scheduler_type == "cosine"
    assert args.normalization == ("token" if name == "sft" else "sequence")


@pytest.mark.parametrize(
    "setting",
    [{"agreement": "token"}, {"ema": "full"}, {"teacher": "base"}, {"beta": 0.5}, {"top_entropy_quantile": 0.5}],
    ids=str,
)
def test_supervised_fine_tuning_refuses_what_it_has_not(tmp_path, setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))}=.* has no effect with preset='sft'"):
        tiny_run.config(tmp_path, preset="sft", **setting)


def test_default_preset_is_unisd_star(tmp_path):
    assert UniSDConfig(str(tmp_path), use_cpu=True).agreement_gamma == 0.001


def test_explicit_arguments_beat_the_preset(tmp_path):
    args = tiny_run.config(tmp_path, preset="unisd_star", contrastive_weight=0.0, ema="none", feature_weight=0.5)
    assert (args.contrastive_weight, args.ema, args.feature_weight) == (0.0, "none", 0.5)
    assert not args.uses_contrastive
    assert args.agreement_gamma == 0.001  # the rest of the preset stands
    # A mechanism turned on beside a preset gets its values for use alone.
    beside = tiny_run.config(tmp_path, preset="plain", contrastive_weight=0.1, agreement="sequence")
    assert (beside.contrastive_margin, beside.agreement_gamma) == (0.5, 0.01)
    # An explicit quantile takes the place of the preset's constant cap.
    quantile = tiny_run.config(tmp_path, preset="clip", clip_quantile=0.9)
    assert (quantile.clip_cap, quantile.loss_settings()["clip_cap"]) == (0.0, None)
    assert quantile.loss_settings()["clip_quantile"] == 0.9


def test_weight_normalization_follows_the_level(tmp_path):
    def resolved(**overrides):
        return tiny_run.config(tmp_path, preset="plain", **overrides).loss_settings()["weight_normalization"]

    assert resolved(agreement="token") == "weighted"
    assert resolved(agreement="sequence") == "count"
    assert resolved(agreement="sequence", weight_normalization="weighted") == "weighted"


def test_parses_yaml_and_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    settings = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "preset": "clip",
        "ema": "merged",
        "clip_cap": 4,
        "agreement_fraction": 0.25,
        "learning_rate": "1e-4",
        "workspace_bytes": None,
    }
    file.write_text(yaml.safe_dump(settings))
    (args,) = TrlParser(UniSDConfig).parse_args_and_config(["--config", str(file), "--agreement", "token"])
    assert (args.preset, args.ema, args.clip_cap, args.agreement) == ("clip", "merged", 4.0, "token")
    assert (args.learning_rate, args.agreement_fraction, args.workspace_bytes) == (1e-4, 0.25, None)
    command = ["--output_dir", str(tmp_path), "--use_cpu", "--preset", "clip", "--clip_cap", "3", "--impl", "torch"]
    (args,) = TrlParser(UniSDConfig).parse_args_and_config([*command, "--workspace_bytes", "1000000"])
    assert (args.clip_cap, args.impl, args.workspace_bytes) == (3.0, "torch", 1000000)
    TrlParser(UniSDConfig).format_help()  # a stray percent sign in a help text would raise


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"preset": "unisd"}, ValueError, "preset must be one of 'plain'"),
        ({"agreement": "tokens"}, ValueError, "agreement must be one of"),
        ({"ema": "lora"}, ValueError, "ema must be one of"),
        ({"impl": "fast"}, ValueError, "impl must be one of"),
        ({"teacher": "other"}, ValueError, "teacher must be one of"),
        ({"normalization": "batch"}, ValueError, "normalization must be one of"),
        ({"overlong": "truncate"}, ValueError, "overlong must be one of 'drop', 'error'"),
        ({"prompt_frame": "plain"}, ValueError, "prompt_frame must be one of 'auto', 'chat', 'given'"),
        ({"weight_normalization": "sum"}, ValueError, "weight_normalization must be one of"),
        ({"agreement_fraction": 0.0}, ValueError, "agreement_fraction must be in"),
        ({"agreement_fraction": 1.5}, ValueError, "agreement_fraction must be in"),
        ({"ema_decay": 1.5}, ValueError, "ema_decay must be in"),
        ({"sync_steps": 0}, ValueError, "sync_steps must be >= 1"),
        ({"num_auxiliary": 0}, ValueError, "num_auxiliary must be >= 1"),
        ({"num_auxiliary": 2.0}, TypeError, "num_auxiliary must be an int"),
        ({"drift_probe_every": -1}, ValueError, "drift_probe_every must be >= 0"),
        ({"workspace_bytes": 0}, ValueError, "workspace_bytes must be >= 1"),
        ({"max_prompt_length": -1}, ValueError, "max_prompt_length must be >= 1"),
        ({"skip_first_tokens": -1}, ValueError, "skip_first_tokens must be >= 0"),
        ({"top_entropy_quantile": 0.0}, ValueError, "top_entropy_quantile must be"),
        ({"teacher_template": "{prompt}"}, ValueError, "teacher_template lacks the placeholder {demonstration}"),
        ({"clip_cap": -1.0}, ValueError, "clip_cap must be >= 0"),
        ({"clip_cap": 1.0, "clip_quantile": 0.9}, ValueError, "exclude each other"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0"),
        ({"beta": 2.0}, ValueError, "beta must be in"),
        ({"teacher": "base"}, ValueError, "cannot be a moving average"),
        ({"preset": "match_repr", "feature_weight": 0.0}, ValueError, "nothing to train on"),
        ({"teacher_model_name_or_path": "other/model"}, ValueError, "distils a model from itself"),
    ],
)
def test_refuses_values_that_make_no_sense(tmp_path, overrides, error, message):
    with pytest.raises(error, match=message):
        tiny_run.config(tmp_path, **overrides)


def test_warns_about_settings_without_effect(tmp_path):
    with pytest.warns(UserWarning, match="agreement_gamma=0.5 has no effect with agreement='none'"):
        tiny_run.config(tmp_path, preset="plain", agreement_gamma=0.5)
    with pytest.warns(UserWarning, match="agreement_fraction has no effect"):
        tiny_run.config(tmp_path, preset="plain", agreement_fraction=0.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has no effect.*")
        tiny_run.config(tmp_path, preset="plain", agreement="token", agreement_gamma=0.5)
        tiny_run.config(tmp_path, preset="plain", agreement_gamma=0.01)  # the preset's own value, as `replace` gives it


@tiny_run.with_the_newest_trl
def test_importing_the_package_is_light():
    code = "import sys, unisd; assert not {'torch', 'trl', 'transformers'} & set(sys.modules); assert unisd.PRESETS"
    # A loop of one's own needs nothing of the trainer's.
    code += "; assert unisd.self_distillation_loss; assert not {'trl', 'transformers', 'accelerate'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lazy_names_resolve():
    import unisd

    assert {name for name in unisd.__all__ if getattr(unisd, name, None) is None} == set()
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        unisd.nonsense  # noqa: B018


@pytest.mark.parametrize("preset", ["agreement_token", "agreement_sequence", "unisd_star"])
@pytest.mark.parametrize("statistic", ["variance", "range"])
def test_agreement_of_one_context_is_refused(tmp_path, preset, statistic):
    """Its spread is 0, so every weight would be 1 and the context's passes wasted."""
    with pytest.raises(ValueError, match=f"num_auxiliary=1: one context has no {statistic}"):
        UniSDConfig(str(tmp_path), preset=preset, num_auxiliary=1, agreement_statistic=statistic)
    assert tiny_run.config(tmp_path, preset="plain", num_auxiliary=1).num_auxiliary == 1
