"""What an optimizer step has to know of all its sequences before its first micro-batch: which of them are scored under
the auxiliary contexts, and with `batch_statistics="global"` the quantities over the whole batch.

The micro-batches of a step see the same weights, and TRL generates their completions together. So the views that a
quantity needs can be read beforehand, in passes of the size of a micro-batch, and the losses come after.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from unisd.agreement import most_uncertain, scored_count, scored_sequences, sequence_means
from unisd.batch import (
    AGREEMENT_WEIGHTS,
    CLIP_CAP,
    DISAGREEMENT,
    SCORED,
    TEACHER_HIDDEN,
    WEIGHT_TOTAL,
    CompletionRows,
    counted_mask,
    crop,
    micro_batches,
)
from unisd.head import gathered_head, head_device
from unisd.mixture import Views, mixed
from unisd.modules import scoring_mode
from unisd.views.scorer import padded_view
from unisd_kernels import agreement_weights, linear_divergence
from unisd_kernels.batch import Batch
from unisd_kernels.ops.quantile import clip_cap

if TYPE_CHECKING:
    from unisd.step import LossStep

# The losses compute the divergences again. The token whose divergence is the cap itself must not lose its gradient to
# their last bits, so the cap is so many units in the last place larger.
_CAP_ULPS = 64


def read_window(
    student: Any, step: LossStep, window: dict[str, Any], mode: str, global_step: int
) -> dict[str, torch.Tensor]:
    """Entries of a window, which its micro-batches then have.

    Args:
        student: the model, unwrapped.
        step: of the run.
        window: the sequences of an optimizer step on this process, or of an evaluation batch.
        mode: "train" or "eval".
        global_step: optimizer steps so far.
    """
    args, size = step.args, window["completion_ids"].shape[0]
    batch_size = args.per_device_train_batch_size if mode == "train" else size
    entries: dict[str, torch.Tensor] = {}
    if step.is_selective:
        # Of an evaluation batch the share is rounded up.
        count = scored_count(args.agreement_fraction, size, global_step if mode == "train" else 0)
        entries |= _ranked(student, step, window, count, batch_size)
    if args.uses_global_statistics:
        entries |= _statistics(student, step, {**window, **entries}, batch_size, is_training=mode == "train")
    return entries


def _ranked(
    student: Any, step: LossStep, window: dict[str, Any], count: int, batch_size: int
) -> dict[str, torch.Tensor]:
    """Which `count` sequences are scored under the auxiliary contexts, and the teacher's hidden states [B, T, H], by
    which that is decided."""
    hidden, entropies = [], []
    version = step.teacher.version(student)
    with step.teacher.scoring(student) as scorer:
        own_head = step.teacher.head(student)
        for batch in micro_batches(window, batch_size):
            batch = batch if step.fixed_shapes else crop(batch)
            mask = counted_mask(batch)
            rows = CompletionRows.of(mask, batch["completion_ids"]).to(head_device(student))
            (view,) = step.views(scorer, batch, rows, [("teacher_prompt", None)], version)
            entropy = step.score(
                student, own_head, view, rows.ids, temperature=step.args.temperature, return_entropy=True
            ).entropy
            assert entropy is not None
            entropies.append(sequence_means(entropy, rows, mask))
            hidden.append(_placed(view, rows, mask, window))
    return {TEACHER_HIDDEN: torch.cat(hidden), SCORED: most_uncertain(torch.cat(entropies), count)}


@dataclass
class _Read:
    """What was read of a window, a micro-batch after the other."""

    scores: list[torch.Tensor] = field(default_factory=list)  # [K, n] of the n tokens of scored sequences
    lengths: list[torch.Tensor] = field(default_factory=list)  # of the scored sequences
    divergences: list[torch.Tensor] = field(default_factory=list)  # [N]
    teacher: list[torch.Tensor] = field(default_factory=list)  # [B, T, H]


def _statistics(
    student: Any, step: LossStep, window: dict[str, Any], batch_size: int, *, is_training: bool
) -> dict[str, torch.Tensor]:
    """The quantities over the window and over all processes: agreement weights and their sum, the cap."""
    args, read = step.args, _Read()
    for batch in micro_batches(window, batch_size):
        _read_batch(student, step, batch if step.fixed_shapes else crop(batch), window, read)
    group = distributed.group.WORLD if step.num_processes > 1 else None
    mask = counted_mask(window)
    rows = CompletionRows.of(mask, window["completion_ids"])
    tokens = Batch.of(rows.cu_seqlens, rows.ids.numel(), group, call="a window of batch_statistics='global'")
    entries: dict[str, torch.Tensor] = {}
    if args.uses_agreement:
        lengths = torch.cat(read.lengths)
        cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0))
        found = agreement_weights(torch.cat(read.scores, 1), cu_seqlens, **step.agreement_settings, row_group=group)
        scored = scored_sequences(window, mask)
        of_scored = scored[rows.positions // mask.shape[1]]
        weights = found.weights.new_ones(rows.ids.numel(), device=mask.device)
        weights[of_scored] = found.weights.to(mask.device)
        entries[AGREEMENT_WEIGHTS] = rows.put(weights.unsqueeze(1), mask.shape).squeeze(2)
        spread = found.disagreement.to(mask.device)
        if args.agreement == "sequence":
            entries[DISAGREEMENT] = spread.new_zeros(len(scored), 1).index_put((scored,), spread.unsqueeze(1))
        else:
            of_tokens = torch.zeros_like(weights).masked_scatter(of_scored, spread)
            entries[DISAGREEMENT] = rows.put(of_tokens.unsqueeze(1), mask.shape).squeeze(2)
        # An evaluation batch is no share of anything: its mean is its own.
        if is_training and args.divides_by_weight_total:
            entries[WEIGHT_TOTAL] = tokens.total(weights).clamp(min=1.0)
    if args.clip_quantile and tokens.num_rows:
        divergence = torch.cat(read.divergences)
        cap = clip_cap(tokens.gathered(divergence.to(mask.device)), args.clip_quantile)
        # One wait for the window; where a divergence is NaN, so is the loss, and no cap can change that.
        entries[CLIP_CAP] = (cap * (1 + _CAP_ULPS * torch.finfo(cap.dtype).eps)).cpu()
    if read.teacher:
        entries[TEACHER_HIDDEN] = torch.cat(read.teacher)
    return entries


def _read_batch(student: Any, step: LossStep, batch: dict[str, Any], window: dict[str, Any], read: _Read) -> None:
    """Read what the quantities need of a micro-batch: the auxiliary views for the agreement; for the cap the teacher,
    with the views that it is mixed of, and the student."""
    args, clips, mixture = step.args, step.args.clip_quantile > 0, step.args.teacher_mixture
    mask = counted_mask(batch)
    rows = CompletionRows.of(mask, batch["completion_ids"]).to(head_device(student))
    scores_all = args.uses_agreement and not step.is_selective
    served = step.begin_served(batch, rows) if scores_all else None
    version = step.teacher.version(student)
    with step.profile.phase("other views"), step.teacher.scoring(student) as scorer:
        own_head = step.teacher.head(student)
        views = step.views_of(
            batch,
            teacher=clips,
            negative=clips and mixture == "contrastive",
            auxiliary=(scores_all and served is None) or (clips and mixture == "consensus"),
        )
        hidden_of = dict(zip(views, step.views(scorer, batch, rows, views, version), strict=True))
        if served is not None:
            read.scores.append(served())
            read.lengths.append(rows.cu_seqlens.diff())
        elif scores_all:
            hidden = [hidden_of[view] for view in step.auxiliary]
            read.scores.append(torch.stack([step.score(student, own_head, each, rows.ids).logprobs for each in hidden]))
            read.lengths.append(rows.cu_seqlens.diff())
        elif args.uses_agreement:
            scores, scored_rows = step.selected_scores(
                student, scorer, own_head, batch, mask.to(rows.ids.device), version
            )
            read.scores.append(scores)
            read.lengths.append(scored_rows.cu_seqlens.diff())
    if not clips:
        return
    # Without dropout: a cap is not to depend on which units one pass happens to drop.
    with step.profile.phase("student"), scoring_mode(student):
        hidden_of_student = rows.take(padded_view(step.hidden_states, student, batch, ("prompt", None)))
    teacher, auxiliary, negative = step.read_views(batch, rows, hidden_of)
    if TEACHER_HIDDEN not in batch:
        read.teacher.append(_placed(teacher, rows, mask, window))
    with step.profile.phase("head and loss"), torch.no_grad(), gathered_head(student):
        head, teacher_head, parts = step.pair(student, own_head, Views(teacher, auxiliary, negative, hidden_of_student))
        read.divergences.append(
            linear_divergence(
                hidden_of_student,
                head,
                mixed(parts) if parts else teacher,
                teacher_head,
                beta=float(args.beta or 0.0),
                temperature=args.temperature,
                impl=args.impl,
                workspace_bytes=args.workspace_bytes,
            )
        )


def _placed(states: torch.Tensor, rows: CompletionRows, mask: torch.Tensor, window: dict[str, Any]) -> torch.Tensor:
    """[b, T, H] of a micro-batch, as long as the window."""
    placed = rows.put(states, mask.shape)
    return nn.functional.pad(placed, (0, 0, 0, window["completion_ids"].shape[1] - placed.shape[1]))
