"""Runs where several processes hold the same rows (tensor, context or sequence parallel): what they do alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate.utils import set_seed
from datasets import IterableDataset
from torch import nn

from unisd.modules import is_peft

if TYPE_CHECKING:
    from unisd.config import UniSDConfig


def copies_of_rows(accelerator: Any) -> int:
    """How many processes share each row."""
    parallelism = getattr(accelerator, "parallelism_config", None)
    return 1 if parallelism is None else int(parallelism.non_data_parallel_size)


def data_parallel_processes(accelerator: Any) -> int:
    """How many groups of processes have rows of their own."""
    return int(accelerator.num_processes) // copies_of_rows(accelerator)


def seed_alike(args: UniSDConfig, accelerator: Any) -> None:
    """Give processes that share rows one seed: TRL seeds each by its rank, and they would draw other tokens and order
    the rows of a step otherwise. The processes of a group stand side by side in the mesh."""
    copies = copies_of_rows(accelerator)
    if copies > 1:
        set_seed(args.seed + accelerator.process_index // copies)


def check_parallelism(args: UniSDConfig, accelerator: Any, model: nn.Module | None = None, dataset: Any = None) -> None:
    """Raise ValueError for what does not work where several processes hold the same rows.

    Args:
        model: the model, unwrapped; None: of which nothing is asked.
        dataset: rows to train on.
    """
    copies = copies_of_rows(accelerator)
    if copies == 1:
        return
    shared = f"{copies} processes share each row (tensor, context or sequence parallel)"
    if args.batch_statistics == "global":
        raise ValueError(
            f"batch_statistics='global' needs rows of its own on every process, but {shared}; use data parallelism "
            "only, or batch_statistics='micro'"
        )
    if args.use_vllm:
        raise ValueError(
            f"use_vllm=True draws completions for every process by itself, but {shared} and need the same ones; set "
            "use_vllm=False"
        )
    if isinstance(dataset, IterableDataset) and args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"TRL repeats the rows of a streamed train_dataset for every process, but {shared}; load it whole, or set "
            "gradient_accumulation_steps=1"
        )
    if model is None or accelerator.parallelism_config.tp_size == 1:
        return
    if is_peft(model):
        raise ValueError(
            f"PEFT's layers take whole weights, but {shared}, whose layers are in slices; train all weights, or use "
            "data parallelism or FSDP2 (unisd launch fsdp2) for the adapter"
        )
    if args.ema != "none" or args.teacher == "base":
        setting = f"ema={args.ema!r}" if args.ema != "none" else "teacher='base'"
        raise ValueError(
            f"{setting} keeps weights of its own, which are not sliced: {shared}; use ema='none' and teacher='self', "
            "or FSDP2 (unisd launch fsdp2)"
        )
