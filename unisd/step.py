"""One micro-batch: its views, their hidden states, and the loss of those.

The teacher's passes over the views come first (`unisd.views`), since a teacher may borrow the student's module
(`unisd.teachers`); then the student's; then `unisd_loss`, from the packed hidden states of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from unisd.agreement import GivenWeights, selected_scores, selective_weights, weights_of_window
from unisd.batch import (
    AGREEMENT_WEIGHTS,
    CLIP_CAP,
    SAMPLER_LOGPROBS,
    TEACHER_HIDDEN,
    WEIGHT_TOTAL,
    CompletionRows,
    counted_mask,
    crop,
)
from unisd.config import UniSDConfig
from unisd.contexts import ContextSpec
from unisd.head import fitted_head, gathered_head, head_device
from unisd.importance import prefix_weights
from unisd.masks import most_entropic
from unisd.mixture import Part, Views, mixed, parts_of_teacher
from unisd.modules import HiddenStates, evaluating, has_dropout, model_head
from unisd.profile.phases import NoProfile, StepProfile
from unisd.sft import supervised_loss
from unisd.teachers import Teacher
from unisd.views import LocalScorer, ServerScorer, ViewScorer
from unisd.views.scorer import View, padded_view
from unisd_kernels import LinearLogProbs, LMHead, UniSDLoss, agreement_weights, linear_logprobs, unisd_loss
from unisd_kernels.config import LossInputs
from unisd_kernels.dtypes import statistics_dtype


@dataclass(frozen=True)
class LossFunctions:
    """Functions on packed hidden states that a step calls; a benchmark puts its own in their place."""

    unisd_loss: Callable[..., UniSDLoss] = unisd_loss
    linear_logprobs: Callable[..., LinearLogProbs] = linear_logprobs


class ReadViews(NamedTuple):
    """Hidden states [N, H] of a micro-batch's tokens under the views that are read."""

    teacher: torch.Tensor
    auxiliary: tuple[torch.Tensor, ...]
    negative: torch.Tensor | None


@dataclass(frozen=True)
class StepResult:
    """Loss of a micro-batch, and all it was made of.

    Attributes:
        batch: ids and masks of all views, cropped.
        inputs: hidden states of the N completion tokens, and the heads.
        loss: as `unisd_loss` returns it.
        given: the agreement weights in `inputs.token_weights`, where the loss does not make them itself.
        parts: the views that are the teacher together (`unisd.mixture`), if it is a mixture.
        importance: [N] weights for a sampler that is not quite the student (`unisd.importance`), if they are asked for.
    """

    batch: dict[str, Any]
    inputs: LossInputs
    loss: UniSDLoss
    given: GivenWeights | None = None
    parts: tuple[Part, ...] = ()
    importance: torch.Tensor | None = None


@dataclass
class LossStep:
    """Way of a micro-batch to its loss.

    Attributes:
        args: settings of the run.
        contexts: the views of a row.
        teacher: scores the views.
        hidden_states: runs a backbone.
        views: scores the views.
        served: scores the auxiliary views of agreement in place of `views`, if they are scored elsewhere.
        num_processes: data-parallel processes.
        is_sharded: whether a forward pass is a collective.
        fixed_shapes: whether batches keep their padding.
        functions: what is called on the hidden states.
        profile: measures the parts.
    """

    args: UniSDConfig
    contexts: ContextSpec
    teacher: Teacher
    hidden_states: HiddenStates
    views: ViewScorer
    served: ServerScorer | None = None
    num_processes: int = 1
    is_sharded: bool = False
    fixed_shapes: bool = False
    functions: LossFunctions = LossFunctions()
    profile: StepProfile | NoProfile = NoProfile()

    @property
    def is_selective(self) -> bool:
        """Whether only some sequences are read under the auxiliary contexts (`unisd.agreement`)."""
        return self.args.uses_agreement and self.args.agreement_fraction < 1.0

    def __call__(self, student: Any, batch: dict[str, Any], num_items_in_batch: torch.Tensor | None) -> StepResult:
        """The loss of a micro-batch of B sequences and N counted tokens.

        Args:
            student: the model, unwrapped.
            batch: ids and masks of all views and of the completions, as TRL's `_prepare_inputs` gives them.
            num_items_in_batch: tokens of the optimizer step over the number of processes, as TRL has it.
        """
        batch = batch if self.fixed_shapes else crop(batch)
        mask = counted_mask(batch)
        rows = CompletionRows.of(mask, batch["completion_ids"]).to(head_device(student))
        if self.args.is_supervised:
            return self._supervised(student, batch, rows, num_items_in_batch)
        mask, given = mask.to(rows.ids.device), None
        if AGREEMENT_WEIGHTS in batch:
            given = weights_of_window(batch, rows, mask, str(self.args.agreement))
        scores_all = self.args.uses_agreement and not self.is_selective and given is None
        served = self.begin_served(batch, rows) if scores_all else None
        version = self.teacher.version(student)
        with self.profile.phase("other views"), self.teacher.scoring(student) as scorer:
            own_head = self.teacher.head(student)
            views = self.views_of(
                batch,
                negative=self.contexts.negative,
                auxiliary=(scores_all and served is None) or self.args.teacher_mixture == "consensus",
            )
            hidden_of = dict(zip(views, self.views(scorer, batch, rows, views, version), strict=True))
            self._compare(student, scorer, own_head, batch, rows, version)
            if self.is_selective and given is None:
                scores = self.selected_scores(student, scorer, own_head, batch, mask, version)
                given = selective_weights(batch, rows, mask, *scores, **self.agreement_settings)
        read = self.read_views(batch, rows, hidden_of)
        teacher, auxiliary, negative = read.teacher, read.auxiliary, read.negative
        with self.profile.phase("student"):
            states = padded_view(self.hidden_states, student, batch, ("prompt", None))
            hidden = rows.take(states)
        importance = self._importance(student, batch, states, rows) if SAMPLER_LOGPROBS in batch else None
        scores_served = None
        if served is not None:
            with self.profile.phase("other views"):  # what is still waited for
                scores_served = served()
        num_items = self._num_items(batch, num_items_in_batch)
        if self.args.top_entropy_quantile < 1.0:
            kept = self._most_entropic(student, hidden, rows)
            rows, hidden, teacher = rows.subset(kept), hidden[kept], teacher[kept]
            auxiliary = tuple(view[kept] for view in auxiliary)
            negative = None if negative is None else negative[kept]
            scores_served = None if scores_served is None else scores_served[:, kept]
            importance = None if importance is None else importance[kept]
            if given is not None:
                given = replace(given, weights=given.weights[kept])
            if num_items is not None and self.args.normalization == "token":
                num_items = num_items * self.args.top_entropy_quantile
        if scores_served is not None:
            found = agreement_weights(scores_served, rows.cu_seqlens, **self.agreement_settings)
            given = GivenWeights(found.weights, found.disagreement, rows.num_sequences)
        with self.profile.phase("head and loss"), gathered_head(student):
            head, teacher_head, parts = self.pair(student, own_head, Views(teacher, auxiliary, negative, hidden))
            inputs = LossInputs(
                student_hidden=hidden,
                student_head=head,
                teacher_hidden=mixed(parts) if parts else teacher,
                teacher_head=teacher_head,
                target_ids=rows.ids,
                cu_seqlens=rows.cu_seqlens,
                # Views that are read for the mixture alone are not scored.
                auxiliary_hidden=auxiliary if scores_all else (),
                negative_hidden=negative if self.args.uses_contrastive else None,
                token_weights=_product(None if given is None else given.weights, importance),
                num_items=None if num_items is None else num_items.to(hidden.device),
                weight_total=self._weight_total(batch, hidden.device),
            )
            loss = self.functions.unisd_loss(**inputs.arguments(), **self._loss_settings(batch))
        return StepResult(batch, inputs, loss, given, tuple(parts), importance)

    @torch.no_grad()
    def _importance(
        self, student: Any, batch: dict[str, Any], states: torch.Tensor, rows: CompletionRows
    ) -> torch.Tensor:
        """Importance weights [N] of the counted tokens, from the student's states [B, T, H] of its training pass."""
        mask = batch["completion_mask"]
        if has_dropout(student):  # what was sampled knows of none
            with evaluating(student):
                states = padded_view(self.hidden_states, student, batch, ("prompt", None))
        sampled = CompletionRows.of(mask, batch["completion_ids"]).to(rows.ids.device)
        hidden = sampled.take(states)
        with gathered_head(student):
            found = self.functions.linear_logprobs(
                hidden,
                fitted_head(model_head(student).detach(), hidden),
                sampled.ids,
                temperature=self.args.temperature,
                impl=self.args.impl,
                workspace_bytes=self.args.workspace_bytes,
            ).logprobs
        placed = sampled.put(found.unsqueeze(1), mask.shape).squeeze(-1)
        cap = self.args.vllm_importance_sampling_clip_max
        sampler, mask = batch[SAMPLER_LOGPROBS].to(placed.device), mask.to(placed.device)
        weights = prefix_weights(placed, sampler, mask, cap)
        return weights.flatten().index_select(0, rows.positions)

    def views_of(self, batch: dict[str, Any], *, negative: bool, auxiliary: bool, teacher: bool = True) -> list[View]:
        """The views to read of a batch; not the teacher's where it was read with the window."""
        first: list[View] = [("teacher_prompt", None)] if teacher and TEACHER_HIDDEN not in batch else []
        if negative:
            first.append(("negative_prompt", None))
        return [*first, *self.auxiliary] if auxiliary else first

    def read_views(self, batch: dict[str, Any], rows: CompletionRows, hidden_of: dict[View, torch.Tensor]) -> ReadViews:
        """The views that were read of a batch, the teacher's perhaps with its window."""
        teacher = hidden_of.get(("teacher_prompt", None))
        return ReadViews(
            rows.take(batch[TEACHER_HIDDEN]) if teacher is None else teacher,
            tuple(hidden_of[view] for view in self.auxiliary if view in hidden_of),
            hidden_of.get(("negative_prompt", None)),
        )

    def pair(self, student: Any, own_head: LMHead | None, views: Views) -> tuple[LMHead, LMHead, list[Part]]:
        """Heads of student and teacher, and the views that the teacher is mixed of; inside `gathered_head`."""
        head = fitted_head(model_head(student), views.student)
        if not torch.is_grad_enabled():
            head = head.detach()  # else evaluation would pay for the head's gradient
        # The very same tensor where the weights are the same.
        teacher_head = head.detach() if own_head is None else fitted_head(own_head, views.teacher)
        mixture, alpha = str(self.args.teacher_mixture), float(self.args.mixture_alpha or 0.0)
        return head, teacher_head, parts_of_teacher(mixture, alpha, views, teacher_head, head)

    def _weight_total(self, batch: dict[str, Any], device: torch.device) -> torch.Tensor | None:
        """Sum of the weights of the whole optimizer step, treated as the number of tokens is (`_num_items`)."""
        return batch[WEIGHT_TOTAL].to(device) / self.num_processes if WEIGHT_TOTAL in batch else None

    def _loss_settings(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Settings of the loss, with the cap of the optimizer step if there is one."""
        settings = self.args.loss_settings()
        if CLIP_CAP in batch:
            # No number where a divergence of the step is none; its micro-batch's loss then says so by itself.
            cap = float(batch[CLIP_CAP])
            settings |= {"clip_quantile": None, "clip_cap": cap if math.isfinite(cap) else None}
        return settings

    def _most_entropic(self, student: Any, hidden: torch.Tensor, rows: CompletionRows) -> torch.Tensor:
        """Places [n] of the tokens at which the student is least sure, by its own head."""
        with torch.no_grad(), gathered_head(student):
            entropy = self.functions.linear_logprobs(
                hidden.detach(),
                fitted_head(model_head(student).detach(), hidden),
                rows.ids,
                temperature=self.args.temperature,
                return_entropy=True,
                impl=self.args.impl,
                workspace_bytes=self.args.workspace_bytes,
            ).entropy
        assert entropy is not None
        return most_entropic(entropy, self.args.top_entropy_quantile)

    def _supervised(
        self, student: Any, batch: dict[str, Any], rows: CompletionRows, num_items_in_batch: torch.Tensor | None
    ) -> StepResult:
        """The cross-entropy of demonstrations (`unisd.sft`)."""
        hidden = rows.take(padded_view(self.hidden_states, student, batch, ("prompt", None)))
        num_items = self._num_items(batch, num_items_in_batch)
        with gathered_head(student):
            head = fitted_head(model_head(student), hidden)
            head = head if torch.is_grad_enabled() else head.detach()
            scores = self.functions.linear_logprobs(
                hidden, head, rows.ids, impl=self.args.impl, workspace_bytes=self.args.workspace_bytes
            )
        loss = supervised_loss(scores, rows.cu_seqlens, str(self.args.normalization), num_items)
        inputs = LossInputs(
            student_hidden=hidden,
            student_head=head,
            teacher_hidden=hidden.detach(),
            teacher_head=head.detach(),
            target_ids=rows.ids,
            cu_seqlens=rows.cu_seqlens,
        )
        return StepResult(batch, inputs, loss)

    def _num_items(self, batch: dict[str, Any], num_items_in_batch: torch.Tensor | None) -> torch.Tensor | None:
        """Sequences or tokens of the whole optimizer step, of which the losses of all micro-batches are shares.

        TRL has divided its number of tokens by the number of processes, since DDP averages gradients where the shares
        of the processes are to be added up; the number of sequences is treated alike.
        """
        if num_items_in_batch is None or self.args.normalization == "token":
            return num_items_in_batch
        return batch["num_sequences_in_batch"].clamp(min=1) / self.num_processes

    @property
    def auxiliary(self) -> list[View]:
        """The auxiliary contexts of a row."""
        return [("auxiliary_prompt", k) for k in range(self.contexts.num_auxiliary)]

    @property
    def agreement_settings(self) -> dict[str, Any]:
        """Keyword arguments of `agreement_weights`."""
        return {
            "level": str(self.args.agreement),
            "statistic": self.args.agreement_statistic,
            "gamma": float(self.args.agreement_gamma or 0.0),
        }

    def selected_scores(
        self,
        student: Any,
        scorer: Any,
        own_head: LMHead | None,
        batch: dict[str, Any],
        mask: torch.Tensor,
        version: Hashable,
    ) -> tuple[torch.Tensor, CompletionRows]:
        """Scores of the chosen sequences of a batch, whose counted tokens are `mask` [B, T]."""
        is_local = self.served is None
        source = self._local(student, scorer, own_head, version) if self.served is None else self.served
        return selected_scores(
            batch,
            mask,
            lambda chosen, of_chosen: source.begin(chosen, of_chosen, self.auxiliary)(),
            num_views=len(self.auxiliary),
            dtype=statistics_dtype(model_head(student).weight.dtype) if is_local else torch.float32,
            always_run=self.is_sharded and is_local,
        )

    def begin_served(self, batch: dict[str, Any], rows: CompletionRows) -> Callable[[], torch.Tensor] | None:
        """If a server scores the auxiliary contexts, what waits for its scores [K, N]; it works while the passes here
        are made."""
        return None if self.served is None else self.served.begin(batch, rows, self.auxiliary)

    def _compare(
        self,
        student: Any,
        scorer: Any,
        own_head: LMHead | None,
        batch: dict[str, Any],
        rows: CompletionRows,
        version: Hashable,
    ) -> None:
        """Verify, before anything is learned from it, that the server scores as the teacher here does; and again in the
        first micro-batch after it was away."""
        # Once by every process, whatever its rows: with sharded weights a pass is a collective, and one process may
        # not see that the server was away.
        if self.served is None or self.served.is_compared(once=self.is_sharded):
            return
        one = self.auxiliary[:1]
        local = self._local(student, scorer, own_head, version).begin(batch, rows, one)
        self.served.compare(local(), self.served.begin(batch, rows, one)())

    def _local(self, student: Any, scorer: Any, own_head: LMHead | None, version: Hashable) -> LocalScorer:
        """What scores views here; inside `Teacher.scoring`."""
        return LocalScorer(
            lambda batch, rows, views: self.views(scorer, batch, rows, views, version),
            lambda hidden, ids: self.score(student, own_head, hidden, ids).logprobs,
        )

    def score(
        self, student: Any, own_head: LMHead | None, hidden: torch.Tensor, ids: torch.Tensor, **options: Any
    ) -> LinearLogProbs:
        """Log-probabilities and entropies of `ids` [N] after `hidden` [N, H] under the teacher's head; inside
        `Teacher.scoring`."""
        with gathered_head(student):
            head = fitted_head(own_head or model_head(student).detach(), hidden)
            return self.functions.linear_logprobs(
                hidden, head, ids, impl=self.args.impl, workspace_bytes=self.args.workspace_bytes, **options
            )


def _product(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one * other
