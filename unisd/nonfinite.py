"""Watch for a NaN or an infinity: it is stopped before the optimizer step, its batch saved and its cause named.

The loss of every micro-batch is checked when it has been computed (TRL reads a value back there anyway, so no wait is
added), the gradient once an optimizer step, when it is that of the whole batch over all processes. All processes learn
of a fault together, at the end of the step's last backward pass, so none is left waiting for the others.

With float16 and loss scaling an overflow of the scaled gradient is part of the method (the scaler skips the step and
lowers the scale), so there only the loss, which is not scaled, is judged.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from unisd.batch import TEACHER_HIDDEN
from unisd.metrics import PREFIX
from unisd.step import StepResult
from unisd_kernels.files import replacing

FOLDER = "nonfinite"
"""Folder in the run's output in which the batches are saved."""
MAX_FILES = 8
"""Batches that are saved in a run, per process: with `on_nonfinite="skip"` there could be one each step."""


@dataclass
class MicroBatch:
    """Part of a micro-batch that is kept until its optimizer step is over.

    Attributes:
        inputs: the tensors of the batch: ids and masks of all views.
        statistics: per token, detached, and `loss`.
        cause: why it is bad, or None.
    """

    inputs: dict[str, Any]
    statistics: dict[str, torch.Tensor]
    cause: str | None = None


@dataclass
class NonFiniteGuard:
    """Watch over one run.

    Attributes:
        mode: "stop" or "skip".
        folder: where batches are saved.
        process: number of this process.
        any_process: whether a condition holds on any process (a collective).
        scales_loss: whether a scaler (or DeepSpeed) judges the gradient.
    """

    mode: str
    folder: str | os.PathLike[str]
    process: int
    any_process: Callable[[bool], bool]
    scales_loss: bool
    _steps: int = 0
    _skipped: int = 0
    _batches: list[MicroBatch] = field(default_factory=list)
    _saved: int = 0

    def watch(self, result: StepResult, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Check the loss of a micro-batch, see `loss`."""
        loss, inputs = result.loss, result.inputs
        auxiliary = {f"auxiliary context {k}": view for k, view in enumerate(inputs.auxiliary_hidden)}
        self.loss(
            loss.loss,
            {name: value for name, value in result.batch.items() if name != TEACHER_HIDDEN},
            {
                "divergence": loss.divergence,
                "contrastive": loss.contrastive,
                "feature_distance": loss.feature_distance,
                "student_entropy": loss.student_entropy,
                "teacher_entropy": loss.teacher_entropy,
                "weights": loss.weights,
            },
            {
                "the student": inputs.student_hidden,
                "the teacher": inputs.teacher_hidden,
                **auxiliary,
                "the negative context": inputs.negative_hidden,
                **{part.name: part.hidden for part in result.parts},
            },
            parameters,
        )

    def loss(
        self,
        loss: torch.Tensor,
        inputs: dict[str, Any],
        statistics: dict[str, torch.Tensor | None],
        terms: dict[str, torch.Tensor | None],
        parameters: Iterable[tuple[str, nn.Parameter]],
    ) -> None:
        """Check a micro-batch's loss.

        Args:
            statistics: per-token values, [N] each.
            terms: hidden states [N, H] by the name of their view.
            parameters: named, of the student.
        """
        kept = {name: value.detach() for name, value in statistics.items() if value is not None}
        batch = MicroBatch(inputs, {"loss": loss.detach(), **kept})
        if not bool(loss.detach().isfinite()):
            batch.cause = _cause_of_loss(loss, terms, kept, parameters)
        self._batches.append(batch)

    def step(self, parameters: list[tuple[str, nn.Parameter]], global_step: int) -> bool:
        """Judge an optimizer step after its last backward pass.

        Returns:
            Whether the step has to be skipped; the gradients are then gone.

        Raises:
            FloatingPointError: something is not finite, and `mode` is "stop" or a weight is not finite itself, which
                no skipping mends.
        """
        batches, self._batches = self._batches, []
        self._steps += 1
        causes = [f"micro-batch {i} of {len(batches)}: {b.cause}" for i, b in enumerate(batches, 1) if b.cause]
        # A bad loss anywhere spoils the gradient everywhere, so the gradient is a cause of its own only without one.
        if not self.any_process(bool(causes)):
            bad = None if self.scales_loss else _cause_of_gradient(parameters)
            if not self.any_process(bad is not None):
                return False
            causes += [bad] if bad else []
        broken = _bad_parameters(parameters)
        saved = self._save(batches, causes, global_step) if causes else None
        if self.mode == "stop" or self.any_process(bool(broken)):
            found = "; ".join(causes) if causes else "another process met a value that is not finite"
            where = f" Its batch is in {saved}." if saved else ""
            raise FloatingPointError(
                f"optimizer step {global_step + 1} was not made: {found}.{where} The weights are those of step "
                f"{global_step}. Lower the learning rate, or check the data and fp16 overflow"
                + ("" if broken else "; on_nonfinite='skip' leaves such steps out and goes on")
            )
        self._skipped += 1
        for _, parameter in parameters:
            if not self.scales_loss:
                parameter.grad = None
            elif parameter.grad is not None:
                # The scaler has to see it: it then skips the step itself, and an optimizer without gradients is an
                # error to it.
                parameter.grad.fill_(torch.inf)
        return True

    def correct(self, logs: dict[str, float]) -> None:
        """Make a logged loss the mean over the steps that were made, and log how many were skipped."""
        if "loss" not in logs:
            return
        steps, skipped = self.take_counts()
        if skipped:
            logs["loss"] = logs["loss"] * steps / (steps - skipped) if steps > skipped else math.nan
            logs[PREFIX + "skipped_steps"] = skipped

    def take_counts(self) -> tuple[int, int]:
        """Number of optimizer steps since the last call, and of those among them that were skipped."""
        counts = self._steps, self._skipped
        self._steps = self._skipped = 0
        return counts

    def _save(self, batches: list[MicroBatch], causes: list[str], global_step: int) -> Path | None:
        """Save the micro-batches of a step (those with a bad loss, or all for a bad gradient), in one write."""
        if self._saved >= MAX_FILES:
            return None
        self._saved += 1
        bad = [batch for batch in batches if batch.cause] or batches
        content = {
            "step": global_step + 1,
            "process": self.process,
            "causes": causes,
            "micro_batches": [
                {"cause": batch.cause, "inputs": _on_cpu(batch.inputs), "statistics": _on_cpu(batch.statistics)}
                for batch in bad
            ],
        }
        path = Path(self.folder) / FOLDER / f"step-{global_step + 1}-process-{self.process}.pt"
        with replacing(path) as new:
            torch.save(content, new)
        return path


def on_any_process(accelerator: Accelerator, condition: bool) -> bool:
    """Whether a condition holds on any process; all of them have to ask."""
    if accelerator.num_processes == 1:
        return condition
    flag = torch.tensor([int(condition)], device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum").item())


def _cause_of_loss(
    loss: torch.Tensor,
    terms: dict[str, torch.Tensor | None],
    statistics: dict[str, torch.Tensor],
    parameters: Iterable[tuple[str, nn.Parameter]],
) -> str:
    """Name the earliest thing on the way to the loss that is not finite: a weight, a view [N, H], a statistic [N]."""
    found = f"the loss is {loss.detach().item()}"
    if bad := _bad_parameters(parameters):
        return f"{found}, and so is the weight {bad[0]}" + (f" ({len(bad)} weights)" if len(bad) > 1 else "")
    views = []
    for name, hidden in terms.items():
        if hidden is None:
            continue
        rows = (~hidden.detach().isfinite()).any(-1).nonzero().flatten().tolist()
        if rows:
            views.append(f"{name} (token {rows[0]}, {len(rows)} of {hidden.shape[0]} tokens)")
    if views:
        return f"{found}; not finite are the hidden states of: {', '.join(views)}"
    names = [name for name, values in statistics.items() if values.numel() and not bool(values.isfinite().all())]
    of = f"; all hidden states are finite, but not {', '.join(names)}" if names else "; all its terms are finite"
    return found + of


def _cause_of_gradient(parameters: list[tuple[str, nn.Parameter]]) -> str | None:
    named = [(name, _local(parameter.grad)) for name, parameter in parameters if parameter.grad is not None]
    named = [(name, gradient) for name, gradient in named if gradient.numel()]
    if not named:
        return None
    # The maximum, not the sum of squares: a large finite gradient is clipping's to judge. One wait for all.
    device = named[0][1].device
    largest = torch._foreach_norm([gradient for _, gradient in named], float("inf"))
    finite = torch.stack([value.isfinite().to(device) for value in largest])
    if bool(finite.all()):
        return None
    bad = [name for (name, _), good in zip(named, finite.tolist(), strict=True) if not good]
    return f"the loss is finite, but not the gradient of {bad[0]}" + (
        f" and {len(bad) - 1} other weights" if len(bad) > 1 else ""
    )


def _bad_parameters(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    return [name for name, parameter in parameters if not bool(_local(parameter.detach()).isfinite().all())]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that this process holds."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _on_cpu(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in values.items()}
