"""Refusals at construction: what could only fail, or do nothing, once rollouts are paid."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from unisd.contexts import ContextSpec
from unisd.modules import is_peft
from unisd.partitions import check_engine

if TYPE_CHECKING:
    from unisd.config import UniSDConfig

logger = logging.getLogger(__name__)


def check_no_teacher_model(teacher_model: object) -> None:
    """Raise ValueError for another model as the teacher, which TRL's trainer takes."""
    if teacher_model is not None:
        raise ValueError(
            "UniSDTrainer takes no teacher_model: the teacher is the model itself under a richer context (see "
            "UniSDConfig.teacher and .ema). Use trl.DistillationTrainer to distil from another model"
        )


def check_columns(contexts: ContextSpec, train_dataset: Any, eval_dataset: Any) -> None:
    """Raise ValueError for a dataset, or one of several, that lacks a column."""
    named = [("train_dataset", train_dataset)]
    if isinstance(eval_dataset, Mapping):
        named += [(f"eval_dataset[{name!r}]", dataset) for name, dataset in eval_dataset.items()]
    else:
        named.append(("eval_dataset", eval_dataset))
    for where, dataset in named:
        # A streamed dataset may not know its columns; its rows are checked as they come.
        columns = getattr(dataset, "column_names", None)
        if columns is not None:
            contexts.check_columns(columns, where)


def check_sharding(args: UniSDConfig, model: nn.Module, engine: Any, *, deepspeed: Mapping[str, Any] | None) -> None:
    """Raise ValueError for settings that FSDP or DeepSpeed cannot serve.

    Args:
        engine: has `fsdp_version` (None without FSDP) and `is_zero3`.
        deepspeed: DeepSpeed's config, or None without it.
    """
    is_deepspeed = deepspeed is not None
    if is_deepspeed and args.on_nonfinite == "skip":
        raise ValueError("on_nonfinite='skip' cannot leave out a step of DeepSpeed; use on_nonfinite='stop'")
    if is_deepspeed and args.drift_budget is not None:
        raise ValueError("drift_budget cannot scale the learning rate of DeepSpeed, which makes its steps by itself")
    setting = f"ema={args.ema!r}" if args.ema != "none" else "teacher='base'"
    if args.ema == "none" and (args.teacher != "base" or is_peft(model)):
        return
    if engine.fsdp_version == 1:
        raise ValueError(
            f"{setting} has weights of its own, which are not sharded under FSDP1: use FSDP2 (unisd launch fsdp2), or "
            "ema='none'"
        )
    if engine.is_zero3:
        check_engine(deepspeed or {}, setting)


def check_trainable(model: nn.Module) -> None:
    """Raise ValueError for a model that has nothing to train."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    if is_peft(model):
        raise ValueError(
            "the adapter is frozen, there is nothing to train: load it with PeftModel.from_pretrained(..., "
            "is_trainable=True)"
        )
    raise ValueError("no parameter of the model requires a gradient, there is nothing to train")


def check_end_token(tokenizer: Any) -> None:
    """Raise ValueError for a tokenizer that cannot end a completion."""
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no eos_token, so that no completion would end before "
            "max_completion_length; set tokenizer.eos_token to the token that ends the model's answers"
        )


def check_special_ids(tokenizer: Any, num_embeddings: int | None) -> None:
    """Raise ValueError if the tokens that end or pad a completion have no embedding."""
    for name in ("eos", "pad"):
        token_id = getattr(tokenizer, f"{name}_token_id")
        if num_embeddings is not None and token_id is not None and token_id >= num_embeddings:
            token = getattr(tokenizer, f"{name}_token")
            raise ValueError(
                f"{name}_token {token!r} has id {token_id}, but the model has {num_embeddings} embeddings; choose a "
                "token of the model, or resize its embeddings"
            )


def check_steps(num_rows: int, dropped: int, args: Any, num_processes: int, *, log: bool) -> None:
    """Raise ValueError if there are fewer rows than one optimizer step takes; say how many an epoch leaves over.

    Args:
        num_rows: rows to train on.
        dropped: rows that were dropped before.
        args: the config.
        num_processes: data-parallel processes.
        log: whether this process speaks.
    """
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    step = batch * accumulation * num_processes
    factors = f"per_device_train_batch_size {batch} x gradient_accumulation_steps {accumulation}"
    factors += f" x {num_processes} processes" if num_processes > 1 else ""
    if num_rows < step:
        after = f" (after {dropped} were dropped)" if dropped else ""
        raise ValueError(
            f"train_dataset has {num_rows} row{'s'[: num_rows != 1]}{after}, but one optimizer step takes {step} "
            f"({factors}); lower one of these, or add rows"
        )
    rest = num_rows % step
    if rest and log:
        which = "drawn anew each time" if args.shuffle_dataset else "always the last"
        logger.warning(
            "train_dataset: each epoch leaves out %d of %d rows (%s): it has %d optimizer steps of %d rows (%s)",
            rest,
            num_rows,
            which,
            num_rows // step,
            step,
            factors,
        )
