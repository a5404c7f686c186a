"""Every flag that `unisd train` takes acts or is refused: a walk over all of them, and what the acting ones reach."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl

from unisd.cli import main
from unisd.cli import train as train_command
from unisd.cli.checks import NEEDS, RAW_ROWS, WITHOUT_EFFECT
from unisd.cli.data import DataArguments
from unisd.cli.errors import CommandError
from unisd.cli.model import ModelArguments, model_to_train
from unisd.cli.train import RunArguments, parse
from unisd.config import UniSDConfig

CLASSES = (DataArguments, UniSDConfig, ModelArguments, RunArguments)
HINTS = {name: hint for cls in CLASSES for name, hint in typing.get_type_hints(cls).items()}
FIELDS = {field.name: field for cls in CLASSES for field in dataclasses.fields(cls) if field.init}

# Values other than the default where the type does not tell one.
VALUES = {
    "accelerator_config": '{"even_batches": false}',
    "activation_checkpointing_kwargs": '{"use_reentrant": false}',
    "agreement": "sequence",
    "agreement_statistic": "range",
    "chat_template_kwargs": '{"a": 1}',
    "dataset": "someone/rows",
    "activation_checkpointing": "true",
    "bnb_4bit_quant_storage": "bfloat16",
    "batch_statistics": "global",
    "bf16": "false",
    "debug": "underflow_overflow",
    "ema": "none",
    "eval_strategy": "steps",
    "fsdp_config": '{"min_num_params": 1}',
    "generation_kwargs": '{"num_beams": 1}',
    "gradient_checkpointing_kwargs": '{"use_reentrant": false}',
    "impl": "reference",
    "include_num_input_tokens_seen": "all",
    "log_level": "info",
    "max_steps": "3",
    "log_level_replica": "info",
    "lr_scheduler_kwargs": '{"num_cycles": 1}',
    "model_init_kwargs": '{"use_safetensors": true}',
    "normalization": "token",
    "teacher": "base",
    "pad_to_multiple_of": "8",
    "mixture_alpha": "0.25",
    "on_nonfinite": "skip",
    "overlong": "error",
    "preset": "plain",
    "prompt_frame": "chat",
    "teacher_model_init_kwargs": "{}",
    "teacher_mixture": "pmi",
    "teacher_template": "{demonstration} {prompt} {study}",
    "view_passes": "packed",
    "view_scorer": "server",
    "view_scorer_url": "http://somewhere:1",
    "weight_normalization": "count",
}
# Flags that a setting is refused without.
WITH = {
    "auto_find_batch_size": [],
    "model_revision": ["--model_name_or_path", "someone/model"],
    "dataset_config": ["--dataset", "someone/rows"],
    "deepspeed": [],
    "eval_on_start": ["--eval_split", "test"],
    "eval_strategy": ["--eval_split", "test"],
    "eval_steps": ["--eval_strategy", "steps", "--eval_split", "test"],
    "eval_delay": ["--eval_strategy", "steps", "--eval_split", "test"],
    "liger_kernel_config": ["--use_liger_kernel"],
    "load_best_model_at_end": ["--eval_strategy", "steps", "--eval_split", "test", "--eval_steps", "500"],
    "run_name": ["--report_to", "tensorboard"],
    "teacher": ["--ema", "none"],
    "view_scorer": ["--view_scorer_url", "http://somewhere:1", "--teacher", "base", "--ema", "none"],
}
WITH["vllm_importance_sampling_clip_max"] = ["--use_vllm", "--vllm_importance_sampling_correction"]
WITH["view_scorer_url"] = ["--view_scorer", "server", *WITH["view_scorer"][2:]]
_BY_PREFIX = {
    ("bnb_", "use_bnb"): ["--load_in_4bit"],
    ("trackio", "project"): ["--report_to", "trackio"],
    ("hub_",): ["--push_to_hub"],
    ("vllm_",): ["--use_vllm", "--vllm_mode", "server"],
    ("view_scorer_",): [*WITH["view_scorer_url"], *WITH["view_scorer"][:2]],
    ("num_completions", "log_unique"): ["--log_completions"],
    ("dataloader_",): ["--dataloader_num_workers", "2"],
}
WITH |= {name: ["--dataset", "someone/rows"] for name in RAW_ROWS}
for prefixes, switch in _BY_PREFIX.items():
    WITH |= {name: switch for name in FIELDS if name.startswith(prefixes) and name not in {switch[0][2:], *WITH}}
# Settings that cannot be walked through a parse on this machine, with the reason; each is transformers' own and reaches
# its `Trainer`, which is all that is promised.
ELSEWHERE = {
    "deepspeed": "needs the package",
    "fsdp": "needs an accelerator",
    "dataloader_pin_memory": "needs an accelerator",
    "ddp_backend": "needs a launcher",
    "fsdp_config": "needs fsdp",
    "ds3_gather_for_generation": "needs deepspeed",
    "tf32": "needs a GPU",
    "fp16": "refused on a CPU by transformers",
    "use_liger_kernel": "needs a GPU, see tests/trainer/test_trainer_liger.py",
    "fp16_full_eval": "as fp16",
    "liger_kernel_config": "a mapping, from a file only",
    "config": "the parser's",
}


def members(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(member for part in typing.get_args(hint) for member in members(part))
    return (typing.get_origin(hint) or hint,)


def other_value(name: str) -> list[str]:
    """Words of the command line that set a field to something other than its default."""
    field, hint = FIELDS[name], HINTS[name]
    if name in VALUES:
        return [VALUES[name]]
    default = field.default
    choices = field.metadata.get("choices")
    kinds = members(hint)
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Enum):
            choices = [member.value for member in kind]
    if choices:
        return [next(str(choice) for choice in choices if choice not in (default, getattr(default, "value", None)))]
    if bool in kinds:
        return ["false" if default is True else "true"]
    if list in kinds and str not in kinds:
        return ["4", "5"] if typing.get_args(hint) == (int,) else ["some", "other"]
    if int in kinds and str not in kinds:
        return [str(default + 1 if isinstance(default, int) else 3)]
    if float in kinds:
        return ["0.5" if default != 0.5 else "0.25"]
    return ["other"]


@pytest.fixture(autouse=True)
def _with_optional_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "bitsandbytes" or found(name, *rest))
    monkeypatch.setattr("unisd.cli.checks.get_available_reporting_integrations", lambda: ["tensorboard", "trackio"])


@functools.cache
def settings_of(*flags: str) -> dict[str, Any]:
    parsed = parse(flags)
    return {
        field.name: getattr(instance, field.name)
        for instance in (parsed.data, parsed.config, parsed.model, parsed.run)
        for field in dataclasses.fields(instance)
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(FIELDS.keys() - ELSEWHERE.keys()))
def test_a_flag_acts_or_is_refused(name: str, tmp_path: Path):
    words = [f"--{name}", *other_value(name)]
    if name == "output_dir":
        words = ["--output_dir", str(tmp_path)]
    if name == "eval_file":
        (tmp_path / "rows.jsonl").write_text("{}\n")
        words = ["--eval_file", str(tmp_path / "rows.jsonl")]
    if name == "resume_from_checkpoint":
        words = [f"--{name}", str(tmp_path)]
    if name in WITHOUT_EFFECT or name.startswith("teacher_model"):
        with pytest.raises((CommandError, ValueError), match=name) as refusal:
            parse(words)
        assert "\n" not in str(refusal.value)
        return
    if name in NEEDS and name not in _ON_BY_DEFAULT:
        # transformers itself minds some of them, in one line too.
        with pytest.raises(
            (CommandError, ValueError), match=f"{name}(=.* has no effect without | can only be set when)"
        ):
            parse(words)
    before = settings_of(*_BEFORE.get(name, []))[name]
    after = settings_of(*words, *WITH.get(name, []))[name]
    assert after != before, f"--{name} {words[1:]} changed nothing"


# Flags without which the setting has the other value already, by default or on a machine without a GPU.
_BEFORE = {
    "activation_checkpointing": ["--gradient_checkpointing", "false"],
    "use_cpu": ["--use_cpu", "false", "--bf16", "false"],
}
# What these need is so without a flag; that they are refused otherwise is tested below.
_ON_BY_DEFAULT = {
    name for name in NEEDS if name.startswith(("lora_", "procedural_", "load_in", "use_rslora", "use_dora"))
}
_ON_BY_DEFAULT |= {"save_steps", "logging_steps"}


@pytest.mark.parametrize(
    ("name", "switched_off"),
    [
        *(
            (name, ["--no_use_peft"])
            for name in sorted(_ON_BY_DEFAULT)
            if name.startswith(("lora_", "load_in", "use_"))
        ),
        *((name, ["--dataset", "someone/rows"]) for name in sorted(_ON_BY_DEFAULT) if name.startswith("procedural_")),
        ("save_steps", ["--save_strategy", "epoch"]),
        ("logging_steps", ["--logging_strategy", "epoch"]),
    ],
)
def test_a_flag_whose_switch_is_off_is_refused(name: str, switched_off: list[str]):
    with pytest.raises(CommandError, match=f"{name}=.* has no effect without "):
        parse([f"--{name}", *other_value(name), *switched_off])


def test_what_was_found_to_do_nothing_is_refused():
    """Each was given another value in a run, or its readers were read, and nothing changed."""
    assert {
        *("average_tokens_across_devices", "auto_find_batch_size", "data_seed", "label_smoothing_factor", "use_cache"),
        *("do_train", "do_eval", "do_predict", "local_rank", "lora_task_type", "max_tool_calling_iterations"),
        *("batch_eval_metrics", "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"),
        *("include_for_metrics", "label_names", "prediction_loss_only", "include_num_input_tokens_seen"),
        *("length_column_name", "train_sampling_strategy", "parallelism_config"),
        *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    } == WITHOUT_EFFECT.keys()


def test_every_setting_that_is_passed_on_is_read_by_someone():
    """A field of transformers or TRL that no code reads cannot act: it has to be refused."""
    roots = [
        *Path(transformers.__file__).parent.glob("trainer*.py"),
        Path(transformers.__file__).parent / "training_args.py",
        *(Path(transformers.__file__).parent / "integrations").glob("*.py"),
        Path(trl.__file__).parent / "trainer" / "distillation_trainer.py",
        *(Path(train_command.__file__).parents[1]).rglob("*.py"),
    ]
    source = "\n".join(path.read_text(encoding="utf-8") for path in roots)
    read = set(re.findall(r"\.(\w+)", source))
    passed_on = {field.name for field in dataclasses.fields(UniSDConfig) if field.init} - WITHOUT_EFFECT.keys()
    unread = {name for name in passed_on - read if not name.startswith("teacher_model_")}  # the config refuses those
    assert not unread


# What the settings of the model reach.


@pytest.fixture
def loaded(base: Path, monkeypatch: pytest.MonkeyPatch):
    """(keyword arguments with which the trainer is built) of flags, without loading weights."""

    def build(*flags: str) -> Any:
        settings = parse(["--model_name_or_path", str(base), *flags])
        return model_to_train(settings.model, settings.config), settings.config

    return build


LORA = {
    "lora_r": ("7", lambda c: c.r == 7),
    "lora_alpha": ("9", lambda c: c.lora_alpha == 9),
    "lora_dropout": ("0.25", lambda c: c.lora_dropout == 0.25),
    "lora_target_modules": ("q_proj", lambda c: c.target_modules == "q_proj" or c.target_modules == {"q_proj"}),
    "lora_target_parameters": ("some", lambda c: list(c.target_parameters) == ["some"]),
    "lora_modules_to_save": ("norm", lambda c: c.modules_to_save == ["norm"]),
    "use_rslora": ("true", lambda c: c.use_rslora),
    "use_dora": ("true", lambda c: c.use_dora),
}
QUANTIZED = {
    "load_in_4bit": ([], lambda c: c.load_in_4bit and not c.load_in_8bit),
    "load_in_8bit": ([], lambda c: c.load_in_8bit and not c.load_in_4bit),
    "bnb_4bit_quant_type": (["fp4", "--load_in_4bit"], lambda c: c.bnb_4bit_quant_type == "fp4"),
    "use_bnb_nested_quant": (["true", "--load_in_4bit"], lambda c: c.bnb_4bit_use_double_quant),
    "bnb_4bit_quant_storage": (["bfloat16", "--load_in_4bit"], lambda c: c.bnb_4bit_quant_storage == torch.bfloat16),
}
LOADING = {"dtype": "bfloat16", "attn_implementation": "eager", "model_revision": "abc"}


def test_every_setting_of_the_model_is_looked_at_here():
    names = {field.name for field in dataclasses.fields(ModelArguments)}
    assert names - {"model_name_or_path", "use_peft", "lora_task_type"} == {*LORA, *QUANTIZED, *LOADING}


@pytest.mark.parametrize("name", sorted(LORA))
def test_lora_settings_reach_its_config(name: str, loaded):
    value, holds = LORA[name]
    assert not holds(loaded()[0].peft_config) if name != "lora_target_parameters" else True
    assert holds(loaded(f"--{name}", value)[0].peft_config)


def test_without_peft(loaded):
    assert loaded()[0].peft_config is not None
    assert loaded("--no_use_peft")[0].peft_config is None


@pytest.mark.parametrize("name", sorted(QUANTIZED))
def test_quantization_reaches_its_config(name: str, loaded):
    words, holds = QUANTIZED[name]
    assert holds(loaded(f"--{name}", *words)[0].quantization_config)
    assert loaded()[0].quantization_config is None


def test_loading_reaches_from_pretrained(run_flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys):
    """The weights of the base are in the dtype, and the attention of the kind, that were asked for."""
    seen = {}

    class Stop(Exception):
        pass

    def init(self, **arguments):
        from trl.trainer.utils import create_model_from_path

        model = create_model_from_path(arguments["model"], **arguments["args"].model_init_kwargs)
        seen.update(dtype=model.dtype, attention=model.config._attn_implementation)
        raise Stop

    monkeypatch.setattr(train_command.UniSDTrainer, "__init__", init)
    for dtype, attention in (("bfloat16", "eager"), ("float16", "sdpa"), ("float32", "eager")):
        with pytest.raises(Stop):
            main(["train", *run_flags, "--dtype", dtype, "--attn_implementation", attention])
        assert seen == {"dtype": getattr(torch, dtype), "attention": attention}
    assert main(["train", *run_flags, "--attn_implementation", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_a_revision_reaches_model_and_tokenizer(monkeypatch: pytest.MonkeyPatch):
    from unisd.cli import model as module

    seen = []
    monkeypatch.setattr(module.AutoConfig, "from_pretrained", lambda name, **options: seen.append(options) or _Config())
    monkeypatch.setattr(module, "load_tokenizer", lambda name, **options: seen.append(options))
    settings = parse(["--model_name_or_path", "someone/model", "--model_revision", "abc", "--trust_remote_code"])
    model_to_train(settings.model, settings.config)
    assert seen == [{"revision": "abc", "trust_remote_code": True}] * 2
    assert settings.config.model_init_kwargs["revision"] == "abc"


class _Config:
    architectures = ("LlamaForCausalLM",)

    def get_text_config(self):
        return self


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype", "float8"], "there is no 'float8'; did you mean float32"),
        (["--model_revision", "nonsense"], "model_revision=nonsense has no effect on smollm2"),
        (["--load_in_4bit", "--dtype", "auto"], "needs a dtype to compute in"),
        (["--load_in_4bit", "--bnb_4bit_quant_storage", "nonsense"], "bnb_4bit_quant_storage must be"),
        (["--lora_alpha", "0"], "lora_alpha must be above 0, got 0"),
        (["--lora_dropout", "1.5"], "lora_dropout must be in"),
        (["--model_init_kwargs", "abc"], "must be a JSON object"),
        (["--model_init_kwargs", '{"revision": "a"}', "--model_revision", "b"], None),
        (["--per_device_train_batch_size", "-3"], "per_device_train_batch_size must be > 0, got -3"),
        (["--learning_rate", "nan"], "learning_rate must be >= 0, got nan"),
        (["--top_p", "7"], r"top_p must be in \]0, 1\], got 7"),
        (["--max_steps", "0"], "max_steps must be above 0"),
        (["--num_train_epochs", "-1"], "num_train_epochs must be a number above 0"),
        (["--gradient_checkpointing", "false", "--activation_checkpointing", "true"], "contradict each other"),
    ],
)
def test_nonsense_is_refused(flags: list[str], message: str | None):
    if message is None:
        settings = parse([*flags, "--model_name_or_path", "someone/model"])
        with pytest.raises(CommandError, match="model_revision=b contradicts model_init_kwargs, which has revision=a"):
            model_to_train(settings.model, settings.config)
        return
    with pytest.raises((CommandError, ValueError), match=message):
        parse(flags)


def test_quantization_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(CommandError, match="load_in_8bit needs the package bitsandbytes"):
        parse(["--load_in_8bit"])
