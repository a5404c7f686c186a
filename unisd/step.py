"""One micro-batch: its views, their hidden states, and the loss of those.

The teacher's passes over the views come first (`unisd.views`), since a teacher may borrow the student's module
(`unisd.teachers`); then the student's; then `unisd_loss`, from the packed hidden states of both.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from unisd.agreement import SelectiveWeights, most_uncertain, selective_weights, sequence_means
from unisd.batch import SAMPLER_LOGPROBS, SCORED, TEACHER_HIDDEN, CompletionRows, counted_mask, crop, per_sequence
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


@dataclass(frozen=True)
class LossFunctions:
    """Functions on packed hidden states that a step calls; a benchmark puts its own in their place."""

    unisd_loss: Callable[..., UniSDLoss] = unisd_loss
    linear_logprobs: Callable[..., LinearLogProbs] = linear_logprobs


@dataclass(frozen=True)
class StepResult:
    """Loss of a micro-batch, and all it was made of.

    Attributes:
        batch: ids and masks of all views, cropped.
        inputs: hidden states of the N completion tokens, and the heads.
        loss: as `unisd_loss` returns it.
        selective: with selective agreement, or a server that scores, the weights that are `inputs.token_weights`.
        parts: the views that are the teacher together (`unisd.mixture`), if it is a mixture.
        importance: [N] weights for a sampler that is not quite the student (`unisd.importance`), if they are asked for.
    """

    batch: dict[str, Any]
    inputs: LossInputs
    loss: UniSDLoss
    selective: SelectiveWeights | None = None
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
        selective, scores = None, None
        if self.served is not None and not self.is_selective:
            # The server works while the passes here are made.
            scores = self.served.begin(batch, rows, self._auxiliary)
        version = self.teacher.version(student)
        with self.profile.phase("other views"), self.teacher.scoring(student) as scorer:
            own_head = self.teacher.head(student)
            views: list[View] = [("negative_prompt", None)] if self.contexts.negative else []
            if not self.is_selective:
                views = [("teacher_prompt", None), *views, *(self._auxiliary if self.served is None else ())]
            hidden_of = dict(zip(views, self.views(scorer, batch, rows, views, version), strict=True))
            self._compare(student, scorer, own_head, batch, rows, version)
            if self.is_selective:
                hidden_of["teacher_prompt", None] = rows.take(batch[TEACHER_HIDDEN])
                selective = self._selective_weights(student, scorer, own_head, batch, rows, mask, version)
        teacher, negative = hidden_of["teacher_prompt", None], hidden_of.get(("negative_prompt", None))
        auxiliary = tuple(hidden_of[view] for view in self._auxiliary if view in hidden_of)
        with self.profile.phase("student"):
            states = padded_view(self.hidden_states, student, batch, ("prompt", None))
            hidden = rows.take(states)
        importance = self._importance(student, batch, states, rows) if SAMPLER_LOGPROBS in batch else None
        found = None
        if scores is not None:
            with self.profile.phase("other views"):  # what is still waited for
                found = scores()
        num_items = self._num_items(batch, num_items_in_batch)
        if self.args.top_entropy_quantile < 1.0:
            kept = self._most_entropic(student, hidden, rows)
            rows, hidden, teacher = rows.subset(kept), hidden[kept], teacher[kept]
            auxiliary = tuple(view[kept] for view in auxiliary)
            negative = None if negative is None else negative[kept]
            found = None if found is None else found[:, kept]
            importance = None if importance is None else importance[kept]
            if selective is not None:
                selective = replace(selective, weights=selective.weights[kept])
            if num_items is not None and self.args.normalization == "token":
                num_items = num_items * self.args.top_entropy_quantile
        if found is not None:
            agreement = agreement_weights(found, rows.cu_seqlens, **self._agreement_settings)
            selective = SelectiveWeights(agreement.weights, agreement.disagreement, rows.num_sequences)
        with self.profile.phase("head and loss"), gathered_head(student):
            head = fitted_head(model_head(student), hidden)
            if not torch.is_grad_enabled():
                head = head.detach()  # else evaluation would pay for the head's gradient
            # The very same tensor where the weights are the same.
            teacher_head = head.detach() if own_head is None else fitted_head(own_head, teacher)
            parts = parts_of_teacher(self.args, Views(teacher, auxiliary, negative, hidden), teacher_head, head)
            inputs = LossInputs(
                student_hidden=hidden,
                student_head=head,
                teacher_hidden=mixed(parts) if parts else teacher,
                teacher_head=teacher_head,
                target_ids=rows.ids,
                cu_seqlens=rows.cu_seqlens,
                # Views that are read for the mixture alone are not scored.
                auxiliary_hidden=auxiliary if self.args.uses_agreement else (),
                negative_hidden=negative if self.args.uses_contrastive else None,
                token_weights=_product(None if selective is None else selective.weights, importance),
                num_items=None if num_items is None else num_items.to(hidden.device),
            )
            loss = self.functions.unisd_loss(**inputs.arguments(), **self.args.loss_settings())
        return StepResult(batch, inputs, loss, selective, tuple(parts), importance)

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

    def rank(self, student: Any, window: dict[str, Any], *, count: int, batch_size: int) -> dict[str, torch.Tensor]:
        """Entries of a window for selective agreement (`unisd.agreement`): which `count` of its sequences are scored
        under the auxiliary contexts, and the teacher's hidden states [B, T, H], by which that is decided.

        Args:
            student: the model, unwrapped.
            window: the sequences of an optimizer step on this process.
            count: how many are scored.
            batch_size: sequences in one pass.
        """
        size, length = window["completion_ids"].shape
        hidden, entropies = [], []
        version = self.teacher.version(student)
        with self.teacher.scoring(student) as scorer:
            own_head = self.teacher.head(student)
            for start in range(0, size, batch_size):
                batch = {name: value[start : start + batch_size] for name, value in per_sequence(window).items()}
                batch = batch if self.fixed_shapes else crop(batch)
                mask = counted_mask(batch)
                rows = CompletionRows.of(mask, batch["completion_ids"]).to(head_device(student))
                (view,) = self.views(scorer, batch, rows, [("teacher_prompt", None)], version)
                entropy = self._score(
                    student, own_head, view, rows.ids, temperature=self.args.temperature, return_entropy=True
                ).entropy
                assert entropy is not None
                entropies.append(sequence_means(entropy, rows, mask))
                placed = rows.put(view, mask.shape)
                hidden.append(nn.functional.pad(placed, (0, 0, 0, length - placed.shape[1])))
        return {TEACHER_HIDDEN: torch.cat(hidden), SCORED: most_uncertain(torch.cat(entropies), count)}

    def _num_items(self, batch: dict[str, Any], num_items_in_batch: torch.Tensor | None) -> torch.Tensor | None:
        """Sequences or tokens of the whole optimizer step, of which the losses of all micro-batches are shares.

        TRL has divided its number of tokens by the number of processes, since DDP averages gradients where the shares
        of the processes are to be added up; the number of sequences is treated alike.
        """
        if num_items_in_batch is None or self.args.normalization == "token":
            return num_items_in_batch
        return batch["num_sequences_in_batch"].clamp(min=1) / self.num_processes

    @property
    def _auxiliary(self) -> list[View]:
        return [("auxiliary_prompt", k) for k in range(self.contexts.num_auxiliary)]

    def _selective_weights(
        self,
        student: Any,
        scorer: Any,
        own_head: LMHead | None,
        batch: dict[str, Any],
        rows: CompletionRows,
        mask: torch.Tensor,
        version: Hashable,
    ) -> SelectiveWeights:
        """Agreement weights of a micro-batch, whose counted tokens are `rows` [N] and `mask` [B, T]."""
        local = self._local(student, scorer, own_head, version)
        source = local if self.served is None else self.served
        return selective_weights(
            batch,
            rows,
            mask,
            lambda chosen, of_chosen: source.begin(chosen, of_chosen, self._auxiliary)(),
            always_run=self.is_sharded and self.served is None,
            **self._agreement_settings,
        )

    @property
    def _agreement_settings(self) -> dict[str, Any]:
        return {
            "level": str(self.args.agreement),
            "statistic": self.args.agreement_statistic,
            "gamma": float(self.args.agreement_gamma or 0.0),
        }

    def _local(self, student: Any, scorer: Any, own_head: LMHead | None, version: Hashable) -> LocalScorer:
        """What scores views here; inside `Teacher.scoring`."""
        return LocalScorer(
            lambda batch, rows, views: self.views(scorer, batch, rows, views, version),
            lambda hidden, ids: self._score(student, own_head, hidden, ids).logprobs,
        )

    def _compare(
        self,
        student: Any,
        scorer: Any,
        own_head: LMHead | None,
        batch: dict[str, Any],
        rows: CompletionRows,
        version: Hashable,
    ) -> None:
        """Verify once, before anything is learned from it, that the server scores as the teacher here does."""
        if self.served is None or self.served.is_compared:
            return
        # By every process, whatever its rows: with sharded weights a pass is a collective.
        one = self._auxiliary[:1]
        local = self._local(student, scorer, own_head, version).begin(batch, rows, one)
        self.served.compare(local(), self.served.begin(batch, rows, one)())

    def _score(
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
    return one * other if one is not None and other is not None else one if other is None else other
