"""The drift during a run: measured before the first optimizer step, every few and after the last; kept in bounds."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from unisd.drift.budget import DriftBudget
from unisd.drift.probe import DriftProbe, default_probe
from unisd.drift.shrink import can_shrink, shrink
from unisd.metrics import PREFIX
from unisd.modules import is_peft
from unisd.turns import reply_end_ids

if TYPE_CHECKING:
    from unisd.trainer import UniSDTrainer

logger = logging.getLogger(__name__)

NAME = f"{PREFIX}drift_kl"
"""Name in the logs."""
SCALE = f"{PREFIX}drift_lr_scale"
"""Name of the learning rate's factor in the logs of a run with a budget."""
SHRUNK = f"{PREFIX}drift_shrunk"
"""Name of the factor by which what was learned was shrunk; the drift in the logs is that after it."""


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
    if trainer._dist.fsdp_version == 1 and not is_peft(student):
        warnings.warn(
            "the drift from the base model is not measured: FSDP1 shards the weights and full fine-tuning "
            "overwrites the base. Set drift_probe_every=0, or train with LoRA or FSDP2",
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
    if probe.loses_base(student) and not trainer._is_sharded:  # of shards when they are there, see `DistributedTrainer`
        with trainer.accelerator.autocast():
            probe.capture(student)
    return probe


class DriftSchedule(TrainerCallback, ExportableState):
    """Callback that measures and logs the drift, and keeps it within the budget where there is one.

    With a budget it also measures after steps 1, 2, 4, ..., so that the first interval is no leap in the dark. Its
    state is in each checkpoint's `trainer_state.json`.

    Args:
        trainer: of the run, whose `drift` is the probe.
    """

    def __init__(self, trainer: UniSDTrainer) -> None:
        self._trainer = trainer
        self._measured_at: int | None = None
        self._rates: list[float] = []
        self._has_shrunk = False
        budget = trainer.args.drift_budget
        shrinks = not trainer._is_sharded and can_shrink(trainer.accelerator.unwrap_model(trainer.model))
        self._budget = None if budget is None else DriftBudget(budget, can_shrink=shrinks)

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as transformers wants it."""
        saved = {} if self._budget is None else {"budget": self._budget.as_dict()}
        return {"args": {}, "attributes": saved}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._budget is not None and state.global_step > 0:
            saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
            self._budget.restore(saved.get("budget", {}))
        self._measured_at = None if state.global_step == 0 else state.global_step
        self._log(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if self._budget is None:
            return
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= self._budget.scale

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        # What the scheduler set is what it and the logs go on from.
        for group, rate in zip(optimizer.param_groups, self._rates, strict=False):
            group["lr"] = rate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        is_last = step >= state.max_steps or control.should_training_stop
        is_early = self._budget is not None and step < args.drift_probe_every and step & (step - 1) == 0
        if step % args.drift_probe_every and not is_last and not is_early:
            return
        drift = self._measure(step)
        # The latest value of a log, not a mean over steps.
        metrics = self._trainer._metrics["train"]
        if self._budget is not None:
            drift = self._keep_within(self._budget, step, drift, args.drift_probe_every)
            metrics[SCALE] = [self._budget.scale]
            control.should_training_stop |= self._budget.is_used_up
        metrics[NAME] = [drift]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The last step may not have been seen to be the last.
        self._log(state.global_step)

    def _keep_within(self, budget: DriftBudget, step: int, drift: float, every: int) -> float:
        """The drift afterwards."""
        before, left_at = budget.scale, None
        if budget.can_shrink and budget.budget <= drift < math.inf:
            factor, left_at = self._trainer.run_on_student(shrink, self._probe.measure, drift, budget.budget)
            self._trainer._metrics["train"][SHRUNK] = [factor]
        budget.update(step, drift, min(step, every - step) if step < every else every, left_at)
        if self._trainer.is_world_process_zero():
            reached = (
                f"step {step}: the drift from the base is {drift:.3g} of a budget of {budget.budget:.3g} nats a token"
            )
            if budget.is_used_up:
                logger.warning("%s; training stops", reached)
            elif left_at is not None and not self._has_shrunk:
                logger.warning(
                    "%s; what was learned is shrunk to %.3g, now and whenever it passes it", reached, left_at
                )
            elif budget.scale < 1.0 == before:
                logger.warning("%s; the learning rate is scaled from now on, by %.2g at first", reached, budget.scale)
        self._has_shrunk |= left_at is not None
        return drift if left_at is None else left_at

    def _log(self, step: int) -> None:
        if self._measured_at != step:
            Trainer.log(self._trainer, {NAME: self._measure(step)})

    def _measure(self, step: int) -> float:
        self._measured_at = step
        return self._trainer.run_on_student(self._probe.measure)

    @property
    def _probe(self) -> DriftProbe:
        assert self._trainer.drift is not None
        return self._trainer.drift
