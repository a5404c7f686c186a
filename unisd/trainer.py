"""`UniSDTrainer`: UniSD self-distillation on top of TRL's distillation trainer.

This file holds TRL's hooks. A step: TRL samples completions from the student; the contexts of each row are tokenized
beside them (`unisd.contexts`); `unisd.step` goes from there to the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import DistillationTrainer
from trl.trainer.utils import RepeatSampler

from unisd.config import UniSDConfig, config_for
from unisd.contexts import CONTEXT_COLUMNS, ContextSpec, collect_views, tokenize_views
from unisd.drift import DriftProbe
from unisd.drift.schedule import DriftSchedule, make_drift_probe
from unisd.generation.colocated import ready_vllm
from unisd.generation.empty import EmptyCompletions
from unisd.generation.merged import merges_rollouts
from unisd.generation.rollouts import rollout_sampling
from unisd.guards import check_columns, check_end_token, check_no_teacher_model, check_sharding, check_trainable
from unisd.head import check_head, check_mixture
from unisd.importance import SamplerLogprobs
from unisd.liger import use_liger
from unisd.masks import mask_rollout
from unisd.metrics import LossMetrics
from unisd.modules import hidden_before, takes_position_ids
from unisd.nonfinite import NonFiniteGuard, on_any_process
from unisd.parallelism import check_parallelism, copies_of_rows, seed_alike
from unisd.profile import NoProfile, ProfiledRun, StepProfile
from unisd.rows import EpochSampler, RowGate
from unisd.run.distributed import DistributedTrainer
from unisd.run.model_card import PAPER
from unisd.run.record import RunRecord
from unisd.run.settings import resolved_settings
from unisd.sft import demonstration_ids
from unisd.step import LossStep
from unisd.teachers import Teacher, TeacherUpdates, teacher_of_run
from unisd.text_tokenizer import tokenizer_for
from unisd.turns import Prompt
from unisd.views import served_scorer, view_scorer
from unisd.window import read_window

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel


class UniSDTrainer(DistributedTrainer, DistillationTrainer):
    """Trainer of a model by UniSD self-distillation (arXiv 2605.06597).

    Datasets need the column `prompt`, `teacher_prompt` or `privileged_context`, and, where the preset uses them,
    `auxiliary_prompts` and `negative_prompt` (see `unisd.contexts`). Evaluation datasets too. Every row is checked at
    construction, those of a stream as they are drawn; `rows.reports` holds what was found.

    Everything else (rollouts with transformers or vLLM, PEFT, checkpoints, logging) is TRL's. Text only. What gradient
    accumulation and data parallelism give, what a checkpoint holds, and what works with sharded weights:
    docs/training.md.

    Attributes:
        teacher: the model under the teacher's weights (`unisd.teachers`).
        step: from a micro-batch to its loss (`unisd.step`); `step.functions` are the functions it calls.
        rows, drift: the check of the rows, with its reports; the drift's probe, or None.
        recorded_settings: see `CheckpointedTrainer`.

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
        ValueError: a missing column, rows that cannot be used (all of them in one message, see `unisd.rows`),
            fewer rows than an optimizer step takes, nothing to train, a tokenizer without `eos_token`, a teacher that
            does not fit the model, another model as the teacher, a PEFT adapter on the head, a head that does not agree
            with the model's own logits, `nn.DataParallel`, what processes that share rows cannot do
            (`unisd.parallelism`).
        TypeError: `args` of another class, or a `processing_class` without a tokenizer.
    """

    _tag_names = ["trl", "distillation", "unisd"]  # noqa: RUF012
    _name = "UniSD"
    _paper = PAPER

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
        check_no_teacher_model(teacher_model)
        args = config_for(model, args)
        processing_class = tokenizer_for(model, processing_class, args)
        self.recorded_settings = resolved_settings(args)
        self._contexts = ContextSpec.of_run(args)
        self._empty = EmptyCompletions()
        self._sampler = SamplerLogprobs()
        self._given: list[list[int]] = []
        self._profile: StepProfile | NoProfile = NoProfile()
        check_columns(self._contexts, train_dataset, eval_dataset)
        check_end_token(processing_class)
        ready_vllm(args)
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
        if args.profile:
            self._profile = StepProfile(self.accelerator.device)
        student = self.accelerator.unwrap_model(self.model)
        if args.use_liger_kernel:
            use_liger(student, args.liger_kernel_config or {}, use_cpu=args.use_cpu)
        self._takes_position_ids = takes_position_ids(student)
        check_trainable(student)
        check_parallelism(args, self.accelerator, student, self.train_dataset)
        seed_alike(args, self.accelerator)
        self._merges = merges_rollouts(args, student, is_sharded=self._is_sharded)
        check_sharding(args, student, self._dist, deepspeed=self._deepspeed_config)
        self._check_head(student)
        self.teacher: Teacher = teacher_of_run(args, student, sharded=self._is_sharded)
        check_mixture(args, student, self.teacher)
        self.rows = RowGate.for_run(self, self._contexts, student)
        self.train_dataset = self.rows.admit(self.train_dataset, "train_dataset")
        self.eval_dataset = self.rows.admit(self.eval_dataset, "eval_dataset")
        self.rows.check_steps("train_dataset")
        self.step = LossStep(
            args,
            self._contexts,
            self.teacher,
            self._get_last_hidden_state,
            view_scorer(
                args,
                self._get_last_hidden_state,
                is_sharded=self._is_sharded,
                pads=self.pad_to_multiple_of is not None,
                takes_positions=self._takes_position_ids,
            ),
            served_scorer(args, self.accelerator.num_processes),
            num_processes=self.accelerator.num_processes,
            is_sharded=self._is_sharded,
            fixed_shapes=self.pad_to_multiple_of is not None,
            profile=self._profile,
        )
        self._loss_metrics = LossMetrics(args, self.accelerator, agrees=args.uses_agreement, teacher=self.teacher.mode)
        self._guard = NonFiniteGuard(
            args.on_nonfinite,
            str(args.output_dir),
            self.accelerator.process_index,
            partial(on_any_process, self.accelerator),
            scales_loss=self.is_deepspeed_enabled or getattr(self.accelerator, "scaler", None) is not None,
        )
        self._step_loss: torch.Tensor | None = None
        self.add_callback(TeacherUpdates(self.teacher, lambda: self.accelerator.unwrap_model(self.model)))
        self.drift: DriftProbe | None = make_drift_probe(self, student, drift_probe)
        if self.drift is not None:
            self.add_callback(DriftSchedule(self))
        self.add_callback(RunRecord(self))
        if isinstance(self._profile, StepProfile):
            self.add_callback(ProfiledRun(self, self._profile))

    def _check_head(self, student: nn.Module) -> None:
        check_head(student, self.accelerator, is_fsdp=self._dist.is_fsdp, is_zero3=self._dist.is_zero3)

    @property
    def _mode(self) -> str:
        assert self.model is not None
        return "train" if self.model.training else "eval"

    # Rows and rollouts

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns: list[str] | None = ["prompt", *CONTEXT_COLUMNS]  # type: ignore[assignment]

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        sampler = super()._get_train_sampler(dataset)
        assert isinstance(sampler, RepeatSampler)
        # TRL counts every process as one with rows of its own.
        sampler.batch_size //= copies_of_rows(self.accelerator)
        return EpochSampler(
            sampler,
            self.args.seed,
            lambda: int(self.state.epoch or 0),
            lambda: 0 < self.state.max_steps <= self.state.global_step,
        )

    def _prompt_ids(self, prompts: list[Prompt]) -> list[list[int]]:
        return self._tokenize_prompts(prompts)[0]

    def _demonstrations(self, rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]) -> list[list[int]]:
        options: Any = self.chat_template_kwargs
        return demonstration_ids(rows, prompts, self._tokenizer, self.chat_template, options)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        # Before the rollout, so that a bad row costs nothing.
        views = collect_views(inputs, self._contexts, self.rows.checker.frame)
        with self._profile.phase("contexts"):
            contexts = tokenize_views(
                views,
                self._prompt_ids,
                self.rows.limit,
                pad_token_id=self._tokenizer.pad_token_id,
                pad_to_multiple_of=self.pad_to_multiple_of,  # type: ignore[arg-type]
            )
        inputs = [{**row, "prompt": prompt} for row, prompt in zip(inputs, views.student, strict=True)]
        if self.args.is_supervised:
            self._given = self._demonstrations(inputs, views.student)
        self._empty.begin()
        with self._profile.phase("rollout"):
            output = super()._generate_and_score_completions(inputs)
        output.update({name: tensor.to(self.accelerator.device) for name, tensor in contexts.items()})
        self._sampler.put(output)
        self._empty.take_out(output, self.accelerator)
        mask_rollout(self, output)
        if self.step.is_selective or self.args.uses_global_statistics:
            # TRL generates for a whole optimizer step.
            output.update(self.run_on_student(read_window, self.step, output, self._mode, self.state.global_step))
        return output

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        if self.args.is_supervised:
            return self._empty.filled(self._given, self._tokenizer.pad_token_id)
        with rollout_sampling(self):
            completion_ids = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return self._empty.filled(completion_ids, self._tokenizer.pad_token_id)

    # Loss

    def _get_last_hidden_state(
        self, unwrapped_model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int
    ) -> torch.Tensor:
        positions = self._takes_position_ids
        return hidden_before(unwrapped_model, input_ids, attention_mask, logits_to_keep, takes_positions=positions)

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
        """Loss, sum of the student's entropies and number of tokens of a micro-batch, as TRL's `compute_loss` wants."""
        mode = self._mode
        result = self.step(student, inputs, num_items_in_batch)
        self._loss_metrics.add(mode, result)
        if mode == "train":
            self._guard.watch(result, student.named_parameters())
        loss, entropies = result.loss.loss, result.loss.student_entropy
        num_tokens = torch.tensor(result.inputs.num_rows, device=loss.device)
        # Feature matching alone makes no logits; `LossMetrics.flush` then takes out what TRL logs of this zero.
        return loss, loss.new_zeros(()) if entropies is None else entropies.sum(), num_tokens

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

    # Evaluation, logs, checkpoints

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as TRL's trainer does; rows given here are checked like those given at construction."""
        if eval_dataset is not None and not isinstance(eval_dataset, str) and eval_dataset is not self.eval_dataset:
            eval_dataset = self.rows.admit(eval_dataset, "eval_dataset given to evaluate")
        return super().evaluate(eval_dataset, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._loss_metrics.flush(self._mode, self._metrics[self._mode], self.state.global_step)
        self._guard.correct(logs)
        super().log(logs, start_time)
