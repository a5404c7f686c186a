"""Measurements of the drift during a run: before the first optimizer step, every few, and after the last."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer, TrainerCallback

from unisd.drift.probe import DriftProbe, default_probe
from unisd.metrics import PREFIX
from unisd.modules import is_peft
from unisd.turns import reply_end_ids

if TYPE_CHECKING:
    from unisd.trainer import UniSDTrainer

NAME = f"{PREFIX}drift_kl"
"""Name in the logs."""


def make_drift_probe(
    trainer: UniSDTrainer, student: nn.Module, items: Sequence[Mapping[str, Any]] | None
) -> DriftProbe | None:
    """The probe of a run; None where it is turned off or, with a warning, where the base is out of reach.

    Args:
        student: unwrapped, before training.
        items: of the probe; None for the package's own.
    """
    args = trainer.args
    if not args.drift_probe_every:
        return None
    needs_capture = not is_peft(student)
    if needs_capture and trainer._is_sharded:
        warnings.warn(
            "the drift from the base model is not measured: FSDP or ZeRO-3 shards the weights and full fine-tuning "
            "overwrites the base. Set drift_probe_every=0, or train with LoRA",
            stacklevel=3,
        )
        return None
    tokenizer: Any = trainer._tokenizer
    if items is None:
        items = default_probe(has_chat_template=tokenizer.chat_template is not None)
    options: Any = trainer.chat_template_kwargs
    probe = DriftProbe(
        items,
        tokenize_prompts=trainer._prompt_ids,
        tokenize_completion=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        reply_end_ids=lambda prompt: reply_end_ids(tokenizer, prompt, trainer.chat_template, dict(options)),
        pad_token_id=tokenizer.pad_token_id,
        hidden_states=trainer._get_last_hidden_state,
        batch_size=args.per_device_eval_batch_size,
        impl=args.impl,
        workspace_bytes=args.workspace_bytes,
    )
    if needs_capture:
        with trainer.accelerator.autocast():
            probe.capture(student)
    return probe


class DriftSchedule(TrainerCallback):
    """Callback that measures and logs the drift.

    Args:
        trainer: of the run, whose `drift` is the probe.
    """

    def __init__(self, trainer: UniSDTrainer) -> None:
        self._trainer = trainer
        self._measured_at: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measured_at = None if state.global_step == 0 else state.global_step
        self._log(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_last = state.global_step >= state.max_steps or control.should_training_stop
        if state.global_step % args.drift_probe_every == 0 or is_last:
            # The latest value of a log, not a mean over steps.
            self._trainer._metrics["train"][NAME] = [self._measure(state.global_step)]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The last step may not have been seen to be the last.
        self._log(state.global_step)

    def _log(self, step: int) -> None:
        if self._measured_at != step:
            Trainer.log(self._trainer, {NAME: self._measure(step)})

    def _measure(self, step: int) -> float:
        assert self._trainer.drift is not None
        self._measured_at = step
        return self._trainer.run_on_student(self._trainer.drift.measure)
