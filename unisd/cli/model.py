"""Model of `unisd train`: which one, and how it is loaded and adapted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config, get_quantization_config

from unisd.cli.errors import CommandError
from unisd.config import UniSDConfig
from unisd.models import FETCHED, SMOLLM2, is_adapter, resolve_model
from unisd.text_tokenizer import load_tokenizer


@dataclass
class ModelArguments(ModelConfig):
    """TRL's model settings with the recipe's defaults: LoRA on all linear layers."""

    model_name_or_path: str | None = field(
        default=SMOLLM2,
        metadata={"help": f"Model id, local folder, or one that is fetched once: {', '.join(FETCHED)}."},
    )
    use_peft: bool = field(default=True, metadata={"help": "Train LoRA adapters; --no_use_peft trains all weights."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "LoRA target modules; 'all-linear' for every one."}
    )


@dataclass(frozen=True)
class ModelToTrain:
    """Arguments of `UniSDTrainer` on its model.

    Attributes:
        source: folder or model id, which the trainer loads with `config.model_init_kwargs`.
        config: of the model, as transformers has it.
        quantization_config, peft_config: or None.
    """

    source: str
    config: Any
    tokenizer: PreTrainedTokenizerBase
    quantization_config: Any
    peft_config: Any


def model_to_train(arguments: ModelArguments, config: UniSDConfig) -> ModelToTrain:
    """Resolve the model's name and put how to load it into `config.model_init_kwargs`.

    Raises:
        CommandError: settings that contradict each other, or a folder that is no causal language model.
        OSError, ValueError: no such model.
    """
    name = str(arguments.model_name_or_path)
    if is_adapter(name):
        raise CommandError(
            f"{name} is the folder of a PEFT adapter: give its base model, or merge the two and give the result; a run "
            "that was interrupted goes on with --resume"
        )
    source = resolve_model(name)
    _set_loading(arguments, config)
    revision = (config.model_init_kwargs or {}).get("revision")  # type: ignore[union-attr]
    loaded = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=config.trust_remote_code)
    if not loaded.architectures:
        raise CommandError(f"config.json of {name} names no architecture: it is not the folder of a saved model")
    if loaded.get_text_config() is not loaded and config.ddp_find_unused_parameters is None:
        # Text alone leaves the vision tower without gradients.
        config.ddp_find_unused_parameters = True
    tokenizer = load_tokenizer(source, revision=revision, trust_remote_code=config.trust_remote_code)
    return ModelToTrain(source, loaded, tokenizer, get_quantization_config(arguments), get_peft_config(arguments))


def _set_loading(arguments: ModelArguments, config: UniSDConfig) -> None:
    loading: dict[str, Any] = {"dtype": arguments.dtype, "revision": arguments.model_revision}
    if arguments.attn_implementation is not None:
        loading["attn_implementation"] = arguments.attn_implementation
    explicit = dict(config.model_init_kwargs or {})  # type: ignore[arg-type]
    defaults = {"dtype": "float32", "revision": "main"}
    for key, value in loading.items():
        if key in explicit and explicit[key] != value:
            if value != defaults.get(key):
                flag = "model_revision" if key == "revision" else key
                raise CommandError(f"{flag}={value} contradicts model_init_kwargs, which has {key}={explicit[key]}")
            continue
        explicit[key] = value
    config.model_init_kwargs = explicit
