"""`unisd train`: a UniSD run from a YAML file and the command line. The command line beats the file.

    unisd train --config run.yaml --learning_rate 1e-4
    unisd train --model_name_or_path smollm2-135m-instruct --dataset procedural --preset unisd_star --output_dir runs/a

Settings are those of `UniSDConfig` (and so of `trl.DistillationConfig`), of `trl.ModelConfig` and of `DataArguments`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from datasets import Dataset, load_dataset
from trl import ModelConfig, TrlParser, get_peft_config

from unisd.config import UniSDConfig
from unisd.data.procedural import procedural_dataset
from unisd.models import SMOLLM2, load_model
from unisd.trainer import UniSDTrainer

_FILE_FORMATS = {"json": "json", "jsonl": "json", "parquet": "parquet", "csv": "csv"}


@dataclass
class DataArguments:
    """Where the rows come from. Their columns are described in `unisd.contexts`."""

    dataset: str = field(
        default="procedural",
        metadata={"help": "'procedural' (generated), a .json/.jsonl/.parquet/.csv file, or a dataset id of the hub."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on; None for no evaluation."})
    procedural_rows: int = field(default=512, metadata={"help": "Rows to generate for 'procedural'."})
    procedural_steps: list[int] = field(
        default_factory=lambda: [1, 2, 3], metadata={"help": "Numbers of steps, which rows take in turn."}
    )
    procedural_look_back: int = field(default=1, metadata={"help": "How many steps back an operand may lie."})


@dataclass
class ModelArguments(ModelConfig):
    """TRL's model settings with the recipe's defaults: LoRA on all linear layers."""

    model_name_or_path: str | None = field(
        default=SMOLLM2, metadata={"help": "Model id, local folder, or 'smollm2-135m-instruct' (fetched once)."}
    )
    use_peft: bool = field(default=True, metadata={"help": "Train LoRA adapters; --no_use_peft trains all weights."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "LoRA target modules; 'all-linear' for every one."}
    )


def load_rows(data: DataArguments, split: str, config: UniSDConfig) -> Dataset:
    """The rows of a split."""
    if data.dataset == "procedural":
        return procedural_dataset(
            data.procedural_rows,
            seed=config.seed,
            split=split,
            num_steps=data.procedural_steps,
            look_back=data.procedural_look_back,
            num_auxiliary=config.num_auxiliary,
        )
    suffix = data.dataset.rsplit(".", 1)[-1].lower()
    if suffix in _FILE_FORMATS:
        return load_dataset(_FILE_FORMATS[suffix], data_files={split: data.dataset}, split=split)
    return load_dataset(data.dataset, data.dataset_config, split=split)


def main(arguments: list[str]) -> int:
    dataclasses = (DataArguments, UniSDConfig, ModelArguments)
    parser = TrlParser(dataclasses, prog="unisd train", description=__doc__)  # type: ignore[arg-type]
    data, config, model_arguments = parser.parse_args_and_config(arguments)
    if model_arguments.model_name_or_path == SMOLLM2:
        model, tokenizer = load_model(SMOLLM2)
    else:
        # TRL loads models by name itself, with `model_init_kwargs` and quantization.
        model, tokenizer = model_arguments.model_name_or_path, None
    trainer = UniSDTrainer(
        model=model,
        args=config,
        train_dataset=load_rows(data, data.train_split, config),
        eval_dataset=load_rows(data, data.eval_split, config) if data.eval_split else None,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_arguments),
    )
    resume = config.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("true", "True", "last") else resume)
    trainer.save_model(config.output_dir)
    print(f"saved to {config.output_dir}", file=sys.stderr)
    return 0
