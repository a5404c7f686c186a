"""Metrics of the loss, summed on the device and read once per log.

Reading a value back from an accelerator waits for it. One read per metric and micro-batch would stall the queue a dozen
times a step, so values are added up where they are and leave the device together when the trainer logs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from unisd.batch import counted_mask
from unisd.peak_memory import peak_memory_gib
from unisd_kernels import UniSDLoss

if TYPE_CHECKING:
    from unisd.config import UniSDConfig
    from unisd.step import StepResult

PREFIX = "unisd/"
LOW_WEIGHT = 0.9
"""Agreement weights below it are counted."""


class MetricWindow:
    """Means (over tokens, sequences or micro-batches) and minima since the last `flush`.

    Sums and counts are kept apart, so a mean is the mean over all tokens of the window, whatever their number in
    each micro-batch or process.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}  # name -> [sum, count]
        self._minima: dict[str, torch.Tensor] = {}

    def add(self, name: str, total: torch.Tensor, count: torch.Tensor | float) -> None:
        """Add a 0-dim sum and the number of items it is over."""
        total = total.detach().float()
        entry = torch.stack([total, torch.as_tensor(count, dtype=torch.float32, device=total.device)])
        self._sums[name] = self._sums[name] + entry if name in self._sums else entry

    def add_values(self, name: str, values: torch.Tensor) -> None:
        """Add the items of a tensor (bool or float)."""
        self.add(name, values.detach().float().sum(), values.numel())

    def add_minimum(self, name: str, values: torch.Tensor) -> None:
        """Take the least item of a tensor into account; an empty one changes nothing."""
        if values.numel() == 0:
            least = torch.full((), math.inf, device=values.device)
        else:
            least = values.detach().float().amin()
        self._minima[name] = torch.minimum(self._minima[name], least) if name in self._minima else least

    def flush(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, tuple[float, float]]:
        """Empty the window.

        Args:
            gather: concatenates a tensor over the processes along its first dimension (`Accelerator.gather`). Every
                process must have added the same names.

        Returns:
            name -> (value, count); a mean over nothing and a minimum over nothing are left out.
        """
        if not self._sums:
            return {}
        local = torch.cat([torch.stack(list(self._sums.values())).flatten(), *map(_row, self._minima.values())])
        rows = gather(local.unsqueeze(0)).tolist()  # the one read
        names, minima = list(self._sums), list(self._minima)
        self._sums, self._minima = {}, {}
        out: dict[str, tuple[float, float]] = {}
        for i, name in enumerate(names):
            total, count = (sum(row[2 * i + j] for row in rows) for j in (0, 1))
            if count > 0:
                out[name] = (total / count, count)
        for i, name in enumerate(minima):
            least = min(row[2 * len(names) + i] for row in rows)
            if not math.isinf(least):
                out[name] = (least, 1.0)
        return out


def _row(scalar: torch.Tensor) -> torch.Tensor:
    return scalar.reshape(1)


class LossMetrics:
    """Metrics of the loss of a run, training and evaluation apart.

    Args:
        args: settings of the run.
        accelerator: of the run.
        agrees: whether there are auxiliary contexts.
        teacher: name of the teacher, for the warning.
    """

    def __init__(self, args: UniSDConfig, accelerator: Accelerator, *, agrees: bool, teacher: str) -> None:
        self._args, self._accelerator, self._agrees, self._teacher = args, accelerator, agrees, teacher
        self._windows = {"train": MetricWindow(), "eval": MetricWindow()}
        self._has_entropy = True
        self._has_warned = False

    def add(self, mode: str, result: StepResult) -> None:
        """Add a micro-batch to the window of "train" or "eval"."""
        window, loss, given = self._windows[mode], result.loss, result.given
        add_loss_statistics(
            window,
            loss,
            clips=bool(self._args.clip_cap or self._args.clip_quantile),
            agreement_weights=_agreement_weights(result) if self._agrees else None,
            disagreement=loss.disagreement if given is None else given.disagreement,
        )
        if self._agrees:
            num_sequences = result.inputs.num_sequences
            spent = num_sequences if given is None else given.num_scored
            window.add("auxiliary_share", torch.tensor(float(spent), device=loss.loss.device), num_sequences)
        if result.importance is not None:
            window.add_values("importance_weight", result.importance)
            window.add_minimum("importance_weight_min", result.importance)
        if self._args.top_entropy_quantile < 1.0:
            kept = torch.tensor(float(result.inputs.num_rows), device=loss.loss.device)
            window.add("top_entropy_share", kept, counted_mask(result.batch).sum())
        self._has_entropy = loss.student_entropy is not None

    def flush(self, mode: str, metrics: dict[str, list[float]], step: int) -> None:
        """Empty a window into TRL's metrics, each under `PREFIX`.

        Args:
            metrics: name -> values since the last log; "entropy" is taken out where no logits were made.
            step: optimizer steps so far, for the warning about losses that are not finite.
        """
        values = self._windows[mode].flush(self._accelerator.gather)
        for name, (value, _) in values.items():
            metrics[PREFIX + name].append(value)
        if not values:
            return
        if not self._has_entropy:
            metrics.pop("entropy", None)
        metrics[PREFIX + "peak_memory_gib"].append(peak_memory_gib(self._accelerator.device))
        seconds = sum(metrics.get("step_time", ()))
        num_tokens = next(
            (values[name][1] for name in ("divergence", "feature_distance", "contrastive") if name in values), 0.0
        )
        if mode == "train" and seconds > 0 and num_tokens:
            metrics[PREFIX + "completion_tokens_per_second"].append(num_tokens / seconds)
        share = values["nonfinite_share"][0]
        if share > 0 and not self._has_warned:
            self._has_warned = True
            bad = [name for name, (value, _) in values.items() if not math.isfinite(value)]
            warnings.warn(
                f"the UniSD loss was NaN or infinite in {share:.0%} of the {mode} micro-batches up to step "
                f"{step} (preset {self._args.preset!r}, teacher {self._teacher!r}, "
                f"beta={self._args.beta}, temperature={self._args.temperature}); not finite among the metrics: "
                f"{', '.join(bad) or 'none'}. Check the learning rate, and fp16 overflow in the model",
                stacklevel=2,
            )


def _agreement_weights(result: StepResult) -> torch.Tensor | None:
    """The weights of the loss without those of an importance correction."""
    weights = result.loss.weights
    if weights is None or result.importance is None:
        return weights
    return weights / result.importance.clamp(min=torch.finfo(torch.float32).tiny)


def add_loss_statistics(
    window: MetricWindow,
    result: UniSDLoss,
    *,
    clips: bool,
    agreement_weights: torch.Tensor | None,
    disagreement: torch.Tensor | None,
) -> None:
    """Add the result of `unisd_loss` for one micro-batch.

    Adds: `divergence` (mean over tokens, before clipping), `clipped_share`, `agreement_weight`, `agreement_weight_min`
    and `agreement_low_share` (share of weights below 0.9), `disagreement`, `contrastive` and `contrastive_active`
    (share of tokens with C > 0), `feature_distance`, `student_entropy`, `teacher_entropy`, and `nonfinite_share`
    (share of micro-batches whose loss is NaN or infinite). Units are those of `UniSDLoss`; mechanisms that are off add
    nothing.
    """
    if result.divergence is not None:
        window.add_values("divergence", result.divergence)
    if clips and result.clipped is not None:
        window.add_values("clipped_share", result.clipped)
    if agreement_weights is not None:
        window.add_values("agreement_weight", agreement_weights)
        window.add_minimum("agreement_weight_min", agreement_weights)
        window.add_values("agreement_low_share", agreement_weights < LOW_WEIGHT)
    if disagreement is not None:
        window.add_values("disagreement", disagreement)
    if result.contrastive is not None:
        window.add_values("contrastive", result.contrastive)
        window.add_values("contrastive_active", result.contrastive > 0)
    if result.feature_distance is not None:
        window.add_values("feature_distance", result.feature_distance)
    if result.student_entropy is not None and result.teacher_entropy is not None:
        window.add_values("student_entropy", result.student_entropy)
        window.add_values("teacher_entropy", result.teacher_entropy)
    window.add("nonfinite_share", (~result.loss.detach().isfinite()).float(), 1.0)
