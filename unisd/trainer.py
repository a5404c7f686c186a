"""`UniSDTrainer`: UniSD self-distillation on top of TRL's distillation trainer.

One step: TRL samples completions from the student; the contexts of each row are tokenized beside them; the teacher
(the model itself, see `unisd.teachers`) re-reads the completions under every context; the student reads them under its
prompt; `unisd_kernels.unisd_loss` goes from the hidden states to the loss without any vocabulary-sized tensor.
"""

from __future__ import annotations

import inspect
import math
import os
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import DistillationTrainer
from trl.trainer.utils import RepeatSampler, get_config_model_id

from unisd.agreement import (
    SCORED,
    TEACHER_HIDDEN,
    SelectiveWeights,
    most_uncertain,
    scored_count,
    selective_weights,
    sequence_means,
)
from unisd.checkpoints import mark_complete, resumable, rotate, unmark
from unisd.config import UniSDConfig
from unisd.contexts import CONTEXT_COLUMNS, ContextSpec, LengthLimit, Prompt, collect_views, tokenize_views
from unisd.decoding import own_distribution
from unisd.drift import DriftProbe, default_probe
from unisd.frames import PromptFrame
from unisd.guards import check_end_token, check_special_ids, check_steps, check_trainable
from unisd.metrics import PREFIX, MetricWindow, add_loss_statistics, peak_memory_gib
from unisd.model_card import model_card, write_model_card
from unisd.modules import backbone, is_peft, model_head, remember_head
from unisd.nonfinite import NonFiniteGuard
from unisd.packing import CompletionRows
from unisd.row_check import RowChecker
from unisd.rows import RowGate
from unisd.run_config import resolved_settings
from unisd.run_record import RunRecord
from unisd.sampling import EpochSampler
from unisd.teachers import EMATeacher, Teacher, gathered_head, load_teacher, make_teacher, save_teacher
from unisd.text_tokenizer import tokenizer_for
from unisd.turns import reply_end_ids
from unisd_kernels import LinearLogProbs, LMHead, UniSDLoss, linear_logprobs, unisd_loss

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel


@dataclass(frozen=True)
class _Scored:
    """What the teacher's passes over a micro-batch leave: packed hidden states, and the head if it is its own."""

    teacher: torch.Tensor
    auxiliary: list[torch.Tensor]
    negative: torch.Tensor | None
    head: LMHead | None
    # Selective agreement only: the weights are scored in the teacher's turn and the views are dropped.
    selective: SelectiveWeights | None = None


class UniSDTrainer(DistillationTrainer):
    """Trains a model by UniSD self-distillation (arXiv 2605.06597).

    Datasets need the column `prompt`, `teacher_prompt` or `privileged_context`, and, where the preset uses them,
    `auxiliary_prompts` and `negative_prompt` (see `unisd.contexts`). Evaluation datasets too. Every row is checked at
    construction, those of a stream as they are drawn; `rows.reports` holds what was found.

    Everything else (rollouts with transformers or vLLM, PEFT, checkpoints, logging) is TRL's. Text only.
    Gradient accumulation and data parallelism give the gradient of the whole batch, except that quantities which are
    defined over a batch (the 0.95 quantile of token-level agreement, `clip_quantile`, the sum of token weights with
    `normalization="token"`) are taken over the micro-batch, and the ranking of `agreement_fraction` over the sequences
    of an optimizer step on one process.

    A moving-average teacher is part of every checkpoint (`unisd.teachers.STATE_FILE`); resuming from one without it
    raises. Under FSDP and DeepSpeed ZeRO-3 weights are sharded, so only a teacher without weights of its own
    works there (`ema="none"`; `teacher="base"` with LoRA).

    Args:
        model: model id, path, `PreTrainedModel` or `PeftModel`.
        args: `UniSDConfig`; None for the default one.
        train_dataset, eval_dataset: see above.
        processing_class: tokenizer, or a processor that holds one (of which only the tokenizer is used); None loads the
            model's.
        callbacks, optimizers, quantization_config, peft_config, tools: as in `trl.DistillationTrainer`.
        drift_probe: items `{"prompt": str or messages, "completion": str}` for `unisd.drift`; None takes the
            package's own list.
        teacher_model: refused; the teacher is the model itself.

    Raises:
        ValueError: a missing column, rows that cannot be used (all of them in one message, see `unisd.row_check`),
            fewer rows than an optimizer step takes, nothing to train, a tokenizer without `eos_token`, a teacher that
            does not fit the model, another model as the teacher, a PEFT adapter on the head, a head that does not agree
            with the model's own logits, `nn.DataParallel`.
        TypeError: `args` of another class, or a `processing_class` without a tokenizer.
    """

    _tag_names = ["trl", "distillation", "unisd"]  # noqa: RUF012
    _name = "UniSD"
    _paper = {  # noqa: RUF012
        "title": "UniSD: Towards a Unified Self-Distillation Framework for Large Language Models",
        "id": "2605.06597",
        "citation": textwrap.dedent("""\
            @article{jin2026unisd,
                title  = {{UniSD: Towards a Unified Self-Distillation Framework for Large Language Models}},
                author = {Yiqiao Jin and others},
                year   = 2026,
                eprint = {arXiv:2605.06597},
            }"""),
    }

    args: UniSDConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: UniSDConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable[..., Any]] | None = None,
        *,
        drift_probe: Sequence[Mapping[str, Any]] | None = None,
        teacher_model: None = None,
    ) -> None:
        if teacher_model is not None:
            raise ValueError(
                "UniSDTrainer takes no teacher_model: the teacher is the model itself under a richer context (see "
                "UniSDConfig.teacher and .ema). Use trl.DistillationTrainer to distil from another model"
            )
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = UniSDConfig(f"{name.split('/')[-1]}-UniSD")
        if not isinstance(args, UniSDConfig):
            raise TypeError(f"args must be a UniSDConfig, got {type(args).__name__}")
        processing_class = tokenizer_for(model, processing_class, args)
        # By name, for the run's folder and the model card; `unisd train` adds those of model and data.
        self.recorded_settings = resolved_settings(args)
        self._context_spec = ContextSpec(
            num_auxiliary=args.num_auxiliary if args.uses_agreement else 0,
            negative=args.uses_contrastive,
            preset=args.preset,
        )
        self._empty_completions: list[bool] | None = None  # of the rollout at hand, once it has had its first turn
        _check_datasets(self._context_spec, train_dataset, eval_dataset)
        if processing_class is not None:
            check_end_token(processing_class)
        super().__init__(
            model=model,
            teacher_model=None,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
        )
        student = self.accelerator.unwrap_model(self.model)
        self._takes_position_ids = "position_ids" in inspect.signature(backbone(student).forward).parameters
        check_trainable(student)
        self._check_sharding()
        self._check_head(student)
        self._admit_rows(student)
        if self.is_deepspeed_enabled and args.on_nonfinite == "skip":
            raise ValueError("on_nonfinite='skip' cannot leave out a step of DeepSpeed; use on_nonfinite='stop'")
        self.teacher: Teacher = make_teacher(
            student, teacher=args.teacher, ema=str(args.ema), decay=float(args.ema_decay or 0.0)
        )
        self._windows = {"train": MetricWindow(), "eval": MetricWindow()}
        self._warned_of_nonfinite_loss = False
        self._has_entropy = True
        self.drift: DriftProbe | None = self._make_drift_probe(student, drift_probe)
        self._guard = NonFiniteGuard(
            args.on_nonfinite,
            str(args.output_dir),
            self.accelerator.process_index,
            self._any_process,
            scales_loss=self.is_deepspeed_enabled or getattr(self.accelerator, "scaler", None) is not None,
        )
        self._step_loss: torch.Tensor | None = None
        self._drift_measured_at: int | None = None
        self.add_callback(_AfterStep(self))
        self._record = RunRecord(self)
        self.add_callback(self._record)

    # Construction

    def _admit_rows(self, student: nn.Module) -> None:
        """Check every row of the datasets, and that they are enough for an optimizer step."""
        num_embeddings = getattr(student.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
        check_end_token(self._tokenizer)
        check_special_ids(self._tokenizer, num_embeddings)
        options: dict[str, Any] = dict(self.chat_template_kwargs)  # type: ignore[arg-type]
        options["chat_template"] = self.chat_template
        self._frame = PromptFrame.of(self.args.prompt_frame, self._tokenizer, options)
        self._length_limit = LengthLimit(
            self.args.max_prompt_length,
            getattr(student.config.get_text_config(), "max_position_embeddings", None),  # type: ignore[union-attr,operator]
            completion=int(self.args.max_completion_length or 0),
            rollout=self.args.vllm_max_model_length if self.args.use_vllm else None,
        )
        self.rows = RowGate(
            RowChecker(self._context_spec, self._frame, self._prompt_ids, num_embeddings),
            self._length_limit,
            overlong=self.args.overlong,
            accelerator=self.accelerator,
            tokenizer=self._tokenizer,
            template_options=options,
            tools=self.tools,
            frame_is_automatic=self.args.prompt_frame == "auto",
            progress=not self.args.disable_tqdm,
        )
        self.train_dataset = self.rows.admit(self.train_dataset, "train_dataset")
        self.eval_dataset = self.rows.admit(self.eval_dataset, "eval_dataset")
        report = self.rows.reports.get("train_dataset")
        if report is not None:
            processes, log = self.accelerator.num_processes, self.accelerator.is_main_process
            check_steps(len(report.kept), len(report.overlong), self.args, processes, log=log)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As TRL's; the rows of a dataset given here are checked like those given at construction."""
        if eval_dataset is not None and not isinstance(eval_dataset, str) and eval_dataset is not self.eval_dataset:
            eval_dataset = self.rows.admit(eval_dataset, "eval_dataset given to evaluate")
        return super().evaluate(eval_dataset, *args, **kwargs)

    def _check_sharding(self) -> None:
        if not self._is_sharded:
            return
        if self.args.ema != "none":
            raise ValueError(
                f"ema={self.args.ema!r} needs whole weights, but FSDP or ZeRO-3 shards them; set ema='none', or train "
                "with DDP or ZeRO-2"
            )
        if self.args.teacher == "base" and not is_peft(self.model):
            raise ValueError("teacher='base' copies the model, which FSDP or ZeRO-3 shards; use LoRA, DDP or ZeRO-2")

    def _check_head(self, student: nn.Module) -> None:
        """Verify once, before any rollout, that the head is what the model's own forward makes its logits with; every
        head of the run then has what was found here (`unisd.modules.model_head`)."""
        if self._dist.is_zero3:
            # The weights are in pieces already, and only the engine, which does not exist yet, can run the model.
            with gathered_head(student):
                head = LMHead.from_model(student, verify=False)
            remember_head(student, head.logit_scale, head.softcap, head.vocab_size)
            warnings.warn(
                f"the head of {type(student).__name__} is read as logit_scale={head.logit_scale:.6g}, softcap="
                f"{head.softcap} from its configuration and is not checked: ZeRO-3 shards the weights. Check it once "
                "with LMHead.from_model(model) on the model loaded without DeepSpeed",
                stacklevel=3,
            )
            return
        with self.accelerator.autocast():
            if not self._dist.is_fsdp:
                model_head(student)
                return
            # Not sharded yet, but only the first process of a machine need have loaded the weights.
            found: list[Any] = [None]
            if self.accelerator.is_main_process:
                try:
                    head = model_head(student)
                    found = [(head.logit_scale, head.softcap, head.vocab_size)]
                except ValueError as error:
                    found = [str(error)]  # every process is to raise it
            (result,) = broadcast_object_list(found)
            if isinstance(result, str):
                raise ValueError(result)
            remember_head(student, *result)

    @property
    def _is_sharded(self) -> bool:
        return self._dist.is_fsdp or self._dist.is_zero3

    def _make_drift_probe(
        self, student: nn.Module, drift_probe: Sequence[Mapping[str, Any]] | None
    ) -> DriftProbe | None:
        if not self.args.drift_probe_every:
            return None
        needs_capture = not is_peft(student)
        if needs_capture and self._is_sharded:
            warnings.warn(
                "the drift from the base model is not measured: FSDP or ZeRO-3 shards the weights and full fine-tuning "
                "overwrites the base. Set drift_probe_every=0, or train with LoRA",
                stacklevel=3,
            )
            return None
        if drift_probe is None:
            drift_probe = default_probe(has_chat_template=self._tokenizer.chat_template is not None)
        probe = DriftProbe(
            drift_probe,
            tokenize_prompts=self._prompt_ids,
            tokenize_completion=lambda text: self._tokenizer(text, add_special_tokens=False)["input_ids"],
            reply_end_ids=lambda prompt: reply_end_ids(
                self._tokenizer,
                prompt,
                self.chat_template,
                dict(self.chat_template_kwargs),  # type: ignore[arg-type]
            ),
            pad_token_id=self._tokenizer.pad_token_id,
            hidden_states=self._get_last_hidden_state,
            batch_size=self.args.per_device_eval_batch_size,
            impl=self.args.impl,
            workspace_bytes=self.args.workspace_bytes,
        )
        if needs_capture:
            with self.accelerator.autocast():
                probe.capture(student)
        return probe

    # Data

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns: list[str] | None = ["prompt", *CONTEXT_COLUMNS]  # type: ignore[assignment]

    def _prompt_ids(self, prompts: list[Prompt]) -> list[list[int]]:
        return self._tokenize_prompts(prompts)[0]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        # Before the rollout, so that a bad row costs nothing.
        views = collect_views(inputs, self._context_spec, self._frame)
        contexts = tokenize_views(
            views,
            self._prompt_ids,
            self._length_limit,
            pad_token_id=self._tokenizer.pad_token_id,
            pad_to_multiple_of=self.pad_to_multiple_of,  # type: ignore[arg-type]
        )
        inputs = [{**row, "prompt": prompt} for row, prompt in zip(inputs, views.student, strict=True)]
        self._empty_completions = None
        output = super()._generate_and_score_completions(inputs)
        device = self.accelerator.device
        output.update({name: tensor.to(device) for name, tensor in contexts.items()})
        empty = torch.tensor(self._empty_completions or [False] * len(inputs), device=device)
        output["completion_mask"] = output["completion_mask"].masked_fill(empty.unsqueeze(1), 0)
        counts = torch.stack([torch.tensor(len(inputs), device=device), empty.sum()])
        num_sequences, num_empty = self.accelerator.gather(counts.unsqueeze(0)).sum(0)
        output["num_sequences_in_batch"] = num_sequences
        output["num_items_in_batch"] = output["num_items_in_batch"] - num_empty
        if self._selects:
            output.update(self._ranked(output))
        return output

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        # The loss scores samples of the model's own distribution (under the settings of the run), so nothing of its
        # generation config may bend them.
        with own_distribution(self.accelerator.unwrap_model(self.model)):
            completion_ids = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if self._empty_completions is not None:
            return completion_ids  # a later turn of a conversation with tools
        # TRL asks every completion for its last token. One token stands in for an empty one, and is masked after.
        self._empty_completions = [len(ids) == 0 for ids in completion_ids]
        if any(self._empty_completions):
            warnings.warn(
                f"the sampler returned {sum(self._empty_completions)} empty completions of {len(completion_ids)}; they "
                "count as sequences with a loss of 0",
                stacklevel=2,
            )
        return [list(ids) or [self._tokenizer.pad_token_id] for ids in completion_ids]

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        sampler = super()._get_train_sampler(dataset)
        assert isinstance(sampler, RepeatSampler)
        return EpochSampler(sampler, self.args.seed, lambda: int(self.state.epoch or 0))

    # Loss

    def _get_last_hidden_state(
        self,
        unwrapped_model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
    ) -> torch.Tensor:
        """[B, T, H] hidden states that predict the last T = `logits_to_keep` tokens of left-padded rows.

        Unlike TRL's, positions are counted from the first real token. With relative positions (RoPE) that changes
        nothing but rounding; with learned ones the padding of a batch would shift every row.
        """
        positions = {}
        if self._takes_position_ids:
            positions["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        hidden = backbone(unwrapped_model)(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions
        ).last_hidden_state
        # The state before a token predicts it; the last one predicts nothing that was sampled.
        return hidden[:, -(logits_to_keep + 1) : -1]

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # TRL calls the model's parts past the wrapper in which Accelerate puts autocast, so that `bf16=True` would
        # be ignored.
        with self.accelerator.autocast():
            return self._unisd_loss(unwrapped_student, inputs, num_items_in_batch)

    def _unisd_loss(
        self, student: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(loss, sum of the student's entropies, number of tokens) of a micro-batch, as TRL's `compute_loss` wants."""
        mode = self._mode
        inputs = self._crop(inputs)
        mask = _counted(inputs)
        rows = CompletionRows.of(mask, inputs["completion_ids"]).to(_head_device(student))
        scored = self._teacher_passes(student, inputs, rows, mask)
        hidden = rows.take(self._view(student, inputs, inputs["prompt_ids"], inputs["prompt_mask"]))
        with gathered_head(student):
            result = self._loss_of_rows(student, hidden, rows, scored, self._num_items(inputs, num_items_in_batch))
        self._add_metrics(mode, result, scored, rows)
        if mode == "train":
            self._watch_loss(student, inputs, hidden, scored, result)
        num_tokens = torch.tensor(rows.ids.numel(), device=result.loss.device)
        # Feature matching alone makes no logits; `_flush_metrics` then takes out what TRL logs of this zero.
        self._has_entropy = result.student_entropy is not None
        entropy = result.loss.new_zeros(()) if result.student_entropy is None else result.student_entropy.sum()
        return result.loss, entropy, num_tokens

    def _teacher_passes(
        self, student: Any, inputs: dict[str, Any], rows: CompletionRows, mask: torch.Tensor
    ) -> _Scored:
        """Every view under the teacher's weights, one pass a view. Runs before the student's pass, see
        `unisd.teachers`."""
        with self.teacher.scoring(student) as scorer:
            head = self.teacher.head(student)
            if self._selects:
                teacher = rows.take(inputs[TEACHER_HIDDEN])
            else:
                teacher = rows.take(self._named_view(scorer, inputs, "teacher_prompt"))
            negative = None
            if self._context_spec.negative:
                negative = rows.take(self._named_view(scorer, inputs, "negative_prompt"))
            if self._selects:
                selective = selective_weights(
                    inputs,
                    rows,
                    mask,
                    lambda batch: self._auxiliary_views(scorer, batch),
                    lambda hidden, ids: self._score(student, head, hidden, ids).logprobs,
                    always_run=self._is_sharded,
                    level=str(self.args.agreement),
                    statistic=self.args.agreement_statistic,
                    gamma=float(self.args.agreement_gamma or 0.0),
                )
                return _Scored(teacher, [], negative, head, selective)
            auxiliary = [rows.take(view) for view in self._auxiliary_views(scorer, inputs)]
            return _Scored(teacher, auxiliary, negative, head)

    @property
    def _selects(self) -> bool:
        return self._context_spec.num_auxiliary > 0 and self.args.agreement_fraction < 1.0

    def _ranked(self, window: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Which sequences of a window are scored under the auxiliary contexts, and the teacher's hidden states, by
        which that was decided; see `unisd.agreement`."""
        student = self.accelerator.unwrap_model(self.model)
        with self.accelerator.autocast():
            if not self._is_sharded:
                return self._rank(student, window)
            return self._forward_redirection(self.model_wrapped, student, self._rank, student, window)

    def _rank(self, student: Any, window: dict[str, Any]) -> dict[str, torch.Tensor]:
        size, length = window["completion_ids"].shape
        chunk = self.args.per_device_train_batch_size if self._mode == "train" else size
        hidden, entropies = [], []
        with self.teacher.scoring(student) as scorer:
            head = self.teacher.head(student)
            for start in range(0, size, chunk):
                batch = {name: value[start : start + chunk] for name, value in window.items() if _is_batched(value)}
                batch = self._crop(batch)
                mask = _counted(batch)
                rows = CompletionRows.of(mask, batch["completion_ids"]).to(_head_device(student))
                view = self._named_view(scorer, batch, "teacher_prompt")
                entropy = self._score(
                    student, head, rows.take(view), rows.ids, temperature=self.args.temperature, return_entropy=True
                ).entropy
                assert entropy is not None
                entropies.append(sequence_means(entropy, rows, mask))
                hidden.append(nn.functional.pad(view, (0, 0, 0, length - view.shape[1])))
        # A window is an optimizer step. Of an evaluation batch the share is rounded up.
        step = self.state.global_step if self._mode == "train" else 0
        count = scored_count(self.args.agreement_fraction, size, step)
        return {TEACHER_HIDDEN: torch.cat(hidden), SCORED: most_uncertain(torch.cat(entropies), count)}

    def _score(
        self, student: Any, own_head: LMHead | None, hidden: torch.Tensor, ids: torch.Tensor, **options: Any
    ) -> LinearLogProbs:
        """Log-probabilities and entropies under the teacher's head; inside `Teacher.scoring`."""
        with gathered_head(student):
            head = _fitted(own_head or model_head(student).detach(), hidden)
            return linear_logprobs(
                hidden, head, ids, impl=self.args.impl, workspace_bytes=self.args.workspace_bytes, **options
            )

    def _auxiliary_views(self, scorer: Any, inputs: dict[str, Any]) -> Iterator[torch.Tensor]:
        """[B, T, H] hidden states of the completions under each of the K auxiliary contexts."""
        for k in range(self._context_spec.num_auxiliary):
            yield self._view(
                scorer, inputs, inputs["auxiliary_prompt_ids"][:, k], inputs["auxiliary_prompt_mask"][:, k]
            )

    def _loss_of_rows(
        self,
        student: Any,
        hidden: torch.Tensor,
        rows: CompletionRows,
        scored: _Scored,
        num_items: torch.Tensor | None,
    ) -> UniSDLoss:
        head = _fitted(model_head(student), hidden)
        if not torch.is_grad_enabled():
            head = head.detach()  # else evaluation would pay for the head's gradient
        return unisd_loss(
            hidden,
            head,
            scored.teacher,
            # The very same tensor where the weights are the same.
            head.detach() if scored.head is None else _fitted(scored.head, scored.teacher),
            rows.ids,
            rows.cu_seqlens,
            auxiliary_hidden=scored.auxiliary or None,
            negative_hidden=scored.negative,
            token_weights=None if scored.selective is None else scored.selective.weights,
            num_items=None if num_items is None else num_items.to(hidden.device),
            **self.args.loss_settings(),
        )

    def _num_items(self, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None) -> torch.Tensor | None:
        """What the losses of all micro-batches are shares of: the sequences or tokens of the whole optimizer step.

        TRL has divided its number of tokens by the number of processes, since DDP averages gradients where the shares
        of the processes are to be added up; the number of sequences is treated alike.
        """
        if num_items_in_batch is None or self.args.normalization == "token":
            return num_items_in_batch
        return inputs["num_sequences_in_batch"].clamp(min=1) / self.accelerator.num_processes

    def _named_view(self, model: Any, inputs: dict[str, Any], name: str) -> torch.Tensor:
        return self._view(model, inputs, inputs[f"{name}_ids"], inputs[f"{name}_mask"])

    def _view(self, model: Any, inputs: dict[str, Any], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, T, H] hidden states of the completions under one context."""
        completion_ids, completion_mask = inputs["completion_ids"], inputs["completion_mask"]
        return self._get_last_hidden_state(
            model,
            torch.cat([ids, completion_ids], dim=1),
            torch.cat([mask, completion_mask], dim=1),
            completion_ids.shape[1],
        )

    def _crop(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Cut off columns that are padding in every row: a micro-batch is padded to the longest row of the whole
        generation batch."""
        if self.pad_to_multiple_of is not None:
            return inputs  # fixed shapes are wanted
        left = [name for name in inputs if name.endswith("prompt_mask")]
        lengths = [inputs[name].sum(-1).amax() for name in left]
        # One column is kept at least, so that no pass gets an empty completion.
        *kept, completion = torch.stack([*lengths, inputs["completion_mask"].sum(-1).amax()]).tolist()
        out = dict(inputs)
        for name, length in zip(left, kept, strict=True):
            ids = name.removesuffix("mask") + "ids"
            out[name], out[ids] = inputs[name][..., -max(length, 1) :], inputs[ids][..., -max(length, 1) :]
        for name in ("completion_ids", "completion_mask", "tool_mask", TEACHER_HIDDEN):
            if name in inputs:
                out[name] = inputs[name][:, : max(completion, 1)]
        return out

    # What is not finite

    def _watch_loss(
        self, student: Any, inputs: dict[str, Any], hidden: torch.Tensor, scored: _Scored, result: UniSDLoss
    ) -> None:
        views = {f"auxiliary context {k}": auxiliary for k, auxiliary in enumerate(scored.auxiliary)}
        self._guard.loss(
            result.loss,
            {name: value for name, value in inputs.items() if name != TEACHER_HIDDEN},
            {
                "divergence": result.divergence,
                "contrastive": result.contrastive,
                "feature_distance": result.feature_distance,
                "student_entropy": result.student_entropy,
                "teacher_entropy": result.teacher_entropy,
                "weights": result.weights,
            },
            {"the student": hidden, "the teacher": scored.teacher, **views, "the negative context": scored.negative},
            student.named_parameters(),
        )

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.is_deepspeed_enabled and self._mode == "train":
            # Its engine makes the optimizer step in the backward pass, which is too late.
            self._guard.step(list(self.accelerator.unwrap_model(model).named_parameters()), self.state.global_step)
        return loss

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        # A bad micro-batch's loss would poison the sum that is logged; what it was is in the error and the file.
        loss = torch.where(loss.isfinite(), loss, torch.zeros_like(loss))
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        if not self.accelerator.sync_gradients or self.is_deepspeed_enabled:
            return loss
        step_loss, self._step_loss = self._step_loss, None
        student = self.accelerator.unwrap_model(self.model)
        skip = self._guard.step(list(student.named_parameters()), self.state.global_step)
        # A step that was not made adds nothing to the sum, see `log`.
        return loss - step_loss if skip else loss

    def _any_process(self, condition: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return condition
        flag = torch.tensor([int(condition)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item())

    # Metrics

    @property
    def _mode(self) -> str:
        assert self.model is not None
        return "train" if self.model.training else "eval"

    def _add_metrics(self, mode: str, result: UniSDLoss, scored: _Scored, rows: CompletionRows) -> None:
        window = self._windows[mode]
        agrees = self._context_spec.num_auxiliary > 0
        add_loss_statistics(
            window,
            result,
            clips=bool(self.args.clip_cap or self.args.clip_quantile),
            agreement_weights=result.weights if agrees else None,
            disagreement=result.disagreement if scored.selective is None else scored.selective.disagreement,
        )
        if agrees:
            num_sequences = rows.cu_seqlens.numel() - 1
            spent = num_sequences if scored.selective is None else scored.selective.num_scored
            window.add("auxiliary_share", torch.tensor(float(spent), device=result.loss.device), num_sequences)

    def _flush_metrics(self, mode: str) -> None:
        values = self._windows[mode].flush(self.accelerator.gather)
        metrics = self._metrics[mode]
        for name, (value, _) in values.items():
            metrics[PREFIX + name].append(value)
        if not values:
            return
        if not self._has_entropy:
            metrics.pop("entropy", None)
        metrics[PREFIX + "peak_memory_gib"].append(peak_memory_gib(self.accelerator.device))
        seconds = sum(metrics.get("step_time", ()))
        num_tokens = next(
            (values[name][1] for name in ("divergence", "feature_distance", "contrastive") if name in values), 0.0
        )
        if mode == "train" and seconds > 0 and num_tokens:
            metrics[PREFIX + "completion_tokens_per_second"].append(num_tokens / seconds)
        share = values["nonfinite_share"][0]
        if share > 0 and not self._warned_of_nonfinite_loss:
            self._warned_of_nonfinite_loss = True
            bad = [name for name, (value, _) in values.items() if not math.isfinite(value)]
            warnings.warn(
                f"the UniSD loss was NaN or infinite in {share:.0%} of the {mode} micro-batches up to step "
                f"{self.state.global_step} (preset {self.args.preset!r}, teacher {self.teacher.mode!r}, "
                f"beta={self.args.beta}, temperature={self.args.temperature}); not finite among the metrics: "
                f"{', '.join(bad) or 'none'}. Check the learning rate, and fp16 overflow in the model",
                stacklevel=2,
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._flush_metrics(self._mode)
        if "loss" in logs:
            steps, skipped = self._guard.take_counts()
            if skipped:  # the mean is over the steps that were made
                logs["loss"] = logs["loss"] * steps / (steps - skipped) if steps > skipped else math.nan
                logs[PREFIX + "skipped_steps"] = skipped
        super().log(logs, start_time)

    # Teacher and drift, once an optimizer step

    def _after_optimizer_step(self) -> None:
        student = self.accelerator.unwrap_model(self.model)
        step = self.state.global_step
        if isinstance(self.teacher, EMATeacher) and step % self.args.sync_steps == 0:
            self.teacher.update(student)
        if self.drift is None:
            return
        is_last = step >= self.state.max_steps or self.control.should_training_stop
        if step % self.args.drift_probe_every == 0 or is_last:
            # The latest value of a log, not a mean over steps.
            self._metrics["train"][PREFIX + "drift_kl"] = [self._current_drift(student)]

    def _log_drift(self) -> None:
        """The drift before the first step, or after the last if that was not seen to be the last; logged at once."""
        if self.drift is None or self._drift_measured_at == self.state.global_step:
            return
        drift = self._current_drift(self.accelerator.unwrap_model(self.model))
        Trainer.log(self, {PREFIX + "drift_kl": drift})

    def _current_drift(self, student: nn.Module) -> float:
        self._drift_measured_at = self.state.global_step
        with self.accelerator.autocast():
            return self._measure_drift(student)

    def _measure_drift(self, student: nn.Module) -> float:
        assert self.drift is not None
        if not self._is_sharded:
            return self.drift.measure(student)
        # Through the wrapper's forward, which materializes the shards.
        return self._forward_redirection(self.model_wrapped, student, self.drift.measure, student)

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`, but resumes from complete checkpoints only (`unisd.checkpoints`).

        Args:
            resume_from_checkpoint: True for the newest complete checkpoint of `output_dir` (newer ones that a kill cut
                off are named in a warning), or the folder of one.

        Raises:
            ValueError: no complete checkpoint, or a folder that is not one.
        """
        checkpoint = resumable(resume_from_checkpoint, str(self.args.output_dir))
        return super().train(checkpoint, *args, **kwargs)

    def create_model_card(  # type: ignore[override]  # TRL's signature, which is not transformers'
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md into the output folder: base model, recipe, metrics, drift (see `unisd.model_card`)."""
        if self.is_world_process_zero():
            write_model_card(str(self.args.output_dir), model_card(self, model_name, dataset_name, tags))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_folder = self._get_output_dir(trial)
        folder = os.path.join(run_folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            unmark(folder)
            if isinstance(self.teacher, EMATeacher):
                save_teacher(self.teacher, folder, self.state.global_step)
        # Older checkpoints go only when this one is whole, which is after every process has written its part.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._record.write(folder)
            mark_complete(folder, self.state.global_step)
            best = self.state.best_model_checkpoint
            rotate(run_folder, limit, {folder} | ({best} if best else set()))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # The one hook that every kind of resume passes (DeepSpeed and FSDP load their weights elsewhere), after the
        # trainer state is known and before the first step.
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and isinstance(self.teacher, EMATeacher):
            load_teacher(self.teacher, checkpoint, self.state.global_step)


class _AfterStep(TrainerCallback):
    """Calls the trainer before the first optimizer step, after each one (before it logs and saves) and at the end."""

    def __init__(self, trainer: UniSDTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._drift_measured_at = None if state.global_step == 0 else state.global_step
        self._trainer._log_drift()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._after_optimizer_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._log_drift()


def _head_device(model: Any) -> torch.device:
    return model.get_output_embeddings().weight.device


def _counted(inputs: dict[str, Any]) -> torch.Tensor:
    """[B, T] mask of the completion tokens that are the model's own."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def _is_batched(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _fitted(head: LMHead, hidden: torch.Tensor) -> LMHead:
    """The head in the dtype of the hidden states: mixed precision of FSDP leaves the weights in float32."""
    if head.weight.dtype == hidden.dtype or torch.is_autocast_enabled(hidden.device.type):
        return head
    bias = None if head.bias is None else head.bias.to(hidden.dtype)
    return LMHead(head.weight.to(hidden.dtype), bias, head.logit_scale, head.softcap, head.vocab_size)


def _check_datasets(spec: ContextSpec, train_dataset: Any, eval_dataset: Any) -> None:
    named = [("train_dataset", train_dataset)]
    if isinstance(eval_dataset, Mapping):
        named += [(f"eval_dataset[{name!r}]", dataset) for name, dataset in eval_dataset.items()]
    else:
        named.append(("eval_dataset", eval_dataset))
    for where, dataset in named:
        # A streamed dataset may not know its columns; its rows are checked as they come.
        columns = getattr(dataset, "column_names", None)
        if columns is not None:
            spec.check_columns(columns, where)
