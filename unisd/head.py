"""Output head of a run: checked at construction, gathered where it is sharded, in the dtype of the hidden states."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from trl.trainer.utils import maybe_gather_lm_head_ctx

from unisd.mixture import check_common_head, check_softcap
from unisd.modules import model_head, remember_head
from unisd.partitions import is_partitioned
from unisd.sharding import gather_head
from unisd_kernels import LMHead

if TYPE_CHECKING:
    from unisd.config import UniSDConfig
    from unisd.teachers import Teacher


def check_head(student: nn.Module, accelerator: Accelerator, *, is_fsdp: bool, is_zero3: bool) -> None:
    """Verify once, before any rollout, that the head is what the model's own forward makes its logits with; every
    head of the run then has what was found here (`unisd.modules.model_head`).

    Raises:
        ValueError: a head that does not agree with the model's logits, on every process.
    """
    if is_zero3:
        # The weights are in pieces already, and only the engine, which does not exist yet, can run the model.
        with gathered_head(student):
            head = LMHead.from_model(student, verify=False)
        remember_head(student, head.logit_scale, head.softcap, head.vocab_size)
        warnings.warn(
            f"the head of {type(student).__name__} is read as logit_scale={head.logit_scale:.6g}, softcap="
            f"{head.softcap} from its configuration and is not checked: ZeRO-3 shards the weights. Check it once "
            "with LMHead.from_model(model) on the model loaded without DeepSpeed",
            stacklevel=4,
        )
        return
    with accelerator.autocast():
        if not is_fsdp:
            model_head(student)
            return
        # Not sharded yet, but only the first process of a machine need have loaded the weights.
        found: list[Any] = [None]
        if accelerator.is_main_process:
            try:
                head = model_head(student)
                found = [(head.logit_scale, head.softcap, head.vocab_size)]
            except ValueError as error:
                found = [str(error)]  # every process is to raise it
        (result,) = broadcast_object_list(found)
        if isinstance(result, str):
            raise ValueError(result)
        remember_head(student, *result)


def check_mixture(args: UniSDConfig, student: nn.Module, teacher: Teacher) -> None:
    """Raise ValueError for a mixture that is no hidden state of this model: under a soft cap, or under two heads.

    Args:
        student: the model, unwrapped, whose head has been verified.
        teacher: of the run.
    """
    mixture = str(args.teacher_mixture)
    check_softcap(mixture, student)
    if mixture != "pmi":
        return
    with teacher.scoring(student), gathered_head(student):
        head = teacher.head(student)
    with gathered_head(student):
        if head is not None:
            check_common_head(
                head,
                model_head(student),
                f"the teacher ({teacher.mode}) has another than the student, whose head is trained; use LoRA without "
                "the head, freeze the head, or set teacher='self' and ema='none'",
            )


def gathered_head(model: nn.Module) -> AbstractContextManager[None]:
    """Context with the head in one piece, under ZeRO-3 and FSDP2; nothing elsewhere. Not for a pass of the backbone,
    which itself gathers and releases a tied weight. FSDP2's stays gathered until the backward pass, and with it a
    gradient flows to the shards; without a graph, until the weights are next let go of (`unisd.sharding.reshard`)."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    gather_head(head)
    if not is_partitioned(head.weight):
        return nullcontext()
    return maybe_gather_lm_head_ctx(head.weight, getattr(head, "bias", None))  # type: ignore[arg-type]


def fitted_head(head: LMHead, hidden: torch.Tensor) -> LMHead:
    """The head in the dtype of the hidden states [N, H]: mixed precision of FSDP leaves the weights in float32."""
    if head.weight.dtype == hidden.dtype or torch.is_autocast_enabled(hidden.device.type):
        return head
    bias = None if head.bias is None else head.bias.to(hidden.dtype)
    return replace(head, weight=head.weight.to(hidden.dtype), bias=bias)


def head_device(model: Any) -> torch.device:
    """Device of the head's weight, where the loss is computed."""
    return model.get_output_embeddings().weight.device
