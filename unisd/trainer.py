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
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import DistillationTrainer
from trl.trainer.utils import RepeatSampler, get_config_model_id

from unisd.config import UniSDConfig
from unisd.contexts import CONTEXT_COLUMNS, ContextSpec, LengthLimit, Prompt, collect_views, tokenize_views
from unisd.drift import DriftProbe, default_probe
from unisd.metrics import PREFIX, MetricWindow, add_loss_statistics, peak_memory_gib
from unisd.model_card import model_card, write_model_card
from unisd.modules import backbone, is_peft
from unisd.run_config import resolved_settings
from unisd.run_record import RunRecord
from unisd.sampling import EpochSampler
from unisd.teachers import EMATeacher, Teacher, gathered_head, load_teacher, make_teacher, save_teacher
from unisd.text_tokenizer import tokenizer_for
from unisd_kernels import LinearLogProbs, LMHead, UniSDLoss, agreement_weights, linear_logprobs, pack_rows, unisd_loss

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel


@dataclass(frozen=True)
class _Rows:
    """The N completion tokens of a micro-batch that count, and where they sit in its [B, T] positions.

    Attributes:
        positions: [N] indices into B * T.
        ids: [N] the sampled tokens.
        cu_seqlens: [B + 1].
    """

    positions: torch.Tensor
    ids: torch.Tensor
    cu_seqlens: torch.Tensor

    @classmethod
    def of(cls, mask: torch.Tensor, completion_ids: torch.Tensor) -> _Rows:
        positions = torch.arange(mask.numel(), device=mask.device).view_as(mask)
        positions, ids, cu_seqlens = pack_rows(mask, positions, completion_ids)
        return cls(positions, ids, cu_seqlens)

    def to(self, device: torch.device) -> _Rows:
        return _Rows(self.positions.to(device), self.ids.to(device), self.cu_seqlens.to(device))

    def take(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, T, H] to [N, H], on the device of the rows: a model split over devices may end elsewhere."""
        rows = hidden.flatten(0, 1).index_select(0, self.positions.to(hidden.device))
        return rows.to(self.ids.device)


@dataclass(frozen=True)
class _Scored:
    """What the teacher's passes over a micro-batch leave: packed hidden states, and the head if it is its own."""

    teacher: torch.Tensor
    auxiliary: list[torch.Tensor]
    negative: torch.Tensor | None
    head: LMHead | None
    # Selective agreement only: the weights are scored in the teacher's turn and the views are dropped.
    weights: torch.Tensor | None = None
    disagreement: torch.Tensor | None = None
    scored_sequences: int | None = None


class UniSDTrainer(DistillationTrainer):
    """Trains a model by UniSD self-distillation (arXiv 2605.06597).

    Datasets need the column `prompt`, `teacher_prompt` or `privileged_context`, and, where the preset uses them,
    `auxiliary_prompts` and `negative_prompt` (see `unisd.contexts`). Evaluation datasets too.

    Everything else (rollouts with transformers or vLLM, PEFT, checkpoints, logging) is TRL's. Text only.
    Gradient accumulation and data parallelism give the gradient of the whole batch, except that quantities which are
    defined over a batch (the 0.95 quantile of token-level agreement, `clip_quantile`, the ranking of
    `agreement_fraction`, the sum of token weights with `normalization="token"`) are taken over the micro-batch.

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
        ValueError: a missing column, a teacher that does not fit the model, another model as the teacher, a
            PEFT adapter on the head, `nn.DataParallel`.
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
        _check_datasets(self._context_spec, train_dataset, eval_dataset)
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
        self._length_limit = LengthLimit(
            args.max_prompt_length, getattr(student.config.get_text_config(), "max_position_embeddings", None)
        )
        self._check_sharding()
        self.teacher: Teacher = make_teacher(
            student, teacher=args.teacher, ema=str(args.ema), decay=float(args.ema_decay or 0.0)
        )
        self._windows = {"train": MetricWindow(), "eval": MetricWindow()}
        self._warned_of_nonfinite_loss = False
        self.drift: DriftProbe | None = self._make_drift_probe(student, drift_probe)
        self.add_callback(_AfterStep(self))
        self.add_callback(RunRecord(self))

    # Construction

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
            eos_token_id=self._tokenizer.eos_token_id,
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
        views = collect_views(inputs, self._context_spec)  # before the rollout, so that a bad row costs nothing
        output = super()._generate_and_score_completions(inputs)
        device = self.accelerator.device
        completion_lengths = output["completion_mask"].sum(1).tolist()
        self._length_limit.check("prompt", output["prompt_mask"].sum(1).tolist(), completion_lengths)
        contexts = tokenize_views(
            views,
            self._prompt_ids,
            completion_lengths,
            self._length_limit,
            pad_token_id=self._tokenizer.pad_token_id,
            pad_to_multiple_of=self.pad_to_multiple_of,  # type: ignore[arg-type]
        )
        output.update({name: tensor.to(device) for name, tensor in contexts.items()})
        num_sequences = torch.tensor(output["prompt_ids"].shape[0], device=device)
        output["num_sequences_in_batch"] = self.accelerator.gather(num_sequences).sum()
        return output

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
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        rows = _Rows.of(mask, inputs["completion_ids"]).to(_head_device(student))
        scored = self._teacher_passes(student, inputs, rows, mask)
        hidden = rows.take(self._view(student, inputs, inputs["prompt_ids"], inputs["prompt_mask"]))
        with gathered_head(student):
            result = self._loss_of_rows(student, hidden, rows, scored, self._num_items(inputs, num_items_in_batch))
        self._add_metrics(mode, result, scored, rows)
        assert result.student_entropy is not None
        num_tokens = torch.tensor(rows.ids.numel(), device=result.loss.device)
        return result.loss, result.student_entropy.sum(), num_tokens

    def _teacher_passes(self, student: Any, inputs: dict[str, Any], rows: _Rows, mask: torch.Tensor) -> _Scored:
        """Every view under the teacher's weights, one pass a view. Runs before the student's pass, see
        `unisd.teachers`."""
        with self.teacher.scoring(student) as scorer:

            def view(name: str) -> torch.Tensor:
                return rows.take(self._view(scorer, inputs, inputs[f"{name}_ids"], inputs[f"{name}_mask"]))

            head = self.teacher.head(student)
            teacher = view("teacher_prompt")
            negative = view("negative_prompt") if self._context_spec.negative else None
            if self._context_spec.num_auxiliary and self.args.agreement_fraction < 1.0:
                weights, disagreement, count = self._selective_agreement(
                    student, scorer, head, inputs, rows, mask, teacher
                )
                return _Scored(teacher, [], negative, head, weights, disagreement, count)
            auxiliary = [rows.take(view) for view in self._auxiliary_views(scorer, inputs)]
            return _Scored(teacher, auxiliary, negative, head)

    def _selective_agreement(
        self,
        student: Any,
        scorer: Any,
        own_head: LMHead | None,
        inputs: dict[str, Any],
        rows: _Rows,
        mask: torch.Tensor,
        teacher: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Agreement weights [N] where only the most uncertain sequences are scored under the auxiliary contexts.

        Uncertain: the mean over a sequence's tokens of the teacher's entropy, at the training temperature.

        Returns:
            weights (1 for the tokens of the other sequences), the disagreement of the scored ones, and their number.
        """

        def score(hidden: torch.Tensor, ids: torch.Tensor, **options: Any) -> LinearLogProbs:
            with gathered_head(student):
                head = _fitted(own_head or LMHead.from_model(student).detach(), hidden)
                return linear_logprobs(
                    hidden, head, ids, impl=self.args.impl, workspace_bytes=self.args.workspace_bytes, **options
                )

        entropy = score(teacher, rows.ids, temperature=self.args.temperature, return_entropy=True).entropy
        assert entropy is not None
        mask = mask.to(entropy.device)
        per_position = entropy.new_zeros(mask.numel()).index_copy(0, rows.positions, entropy)
        means = per_position.view_as(mask).sum(1) / mask.sum(1).clamp(min=1)
        # A rounding error in q B must not add a sequence.
        count = max(1, math.ceil(self.args.agreement_fraction * mask.shape[0] - 1e-9))
        chosen = means.topk(count).indices.sort().values

        batch = {name: tensor[chosen.to(tensor.device)] for name, tensor in inputs.items() if _is_batched(tensor)}
        chosen_rows = _Rows.of(mask[chosen], batch["completion_ids"].to(mask.device))
        hidden = [chosen_rows.take(view) for view in self._auxiliary_views(scorer, batch)]
        # Agreement is scored at temperature 1, whatever the training temperature.
        logprobs = torch.stack([score(view, chosen_rows.ids).logprobs for view in hidden])
        agreement = agreement_weights(
            logprobs,
            chosen_rows.cu_seqlens,
            level=str(self.args.agreement),
            statistic=self.args.agreement_statistic,
            gamma=float(self.args.agreement_gamma or 0.0),
        )
        weights = agreement.weights.new_ones(mask.shape)
        of_chosen = weights[chosen].flatten().index_copy(0, chosen_rows.positions, agreement.weights)
        weights[chosen] = of_chosen.view(count, -1)
        return weights.flatten().index_select(0, rows.positions), agreement.disagreement, count

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
        rows: _Rows,
        scored: _Scored,
        num_items: torch.Tensor | None,
    ) -> UniSDLoss:
        head = _fitted(LMHead.from_model(student), hidden)
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
            token_weights=scored.weights,
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
        for name in ("completion_ids", "completion_mask", "tool_mask"):
            if name in inputs:
                out[name] = inputs[name][:, : max(completion, 1)]
        return out

    # Metrics

    @property
    def _mode(self) -> str:
        assert self.model is not None
        return "train" if self.model.training else "eval"

    def _add_metrics(self, mode: str, result: UniSDLoss, scored: _Scored, rows: _Rows) -> None:
        window = self._windows[mode]
        agrees = self._context_spec.num_auxiliary > 0
        add_loss_statistics(
            window,
            result,
            clips=bool(self.args.clip_cap or self.args.clip_quantile),
            agreement_weights=result.weights if agrees else None,
            disagreement=result.disagreement if scored.disagreement is None else scored.disagreement,
        )
        if agrees:
            num_sequences = rows.cu_seqlens.numel() - 1
            spent = num_sequences if scored.scored_sequences is None else scored.scored_sequences
            window.add("auxiliary_share", torch.tensor(float(spent), device=result.loss.device), num_sequences)

    def _flush_metrics(self, mode: str) -> None:
        values = self._windows[mode].flush(self.accelerator.gather)
        metrics = self._metrics[mode]
        for name, (value, _) in values.items():
            metrics[PREFIX + name].append(value)
        if not values:
            return
        metrics[PREFIX + "peak_memory_gib"].append(peak_memory_gib(self.accelerator.device))
        seconds = sum(metrics.get("step_time", ()))
        if mode == "train" and seconds > 0 and "divergence" in values:
            metrics[PREFIX + "completion_tokens_per_second"].append(values["divergence"][1] / seconds)
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
        super().log(logs, start_time)

    # Teacher and drift, once an optimizer step

    def _after_optimizer_step(self) -> None:
        student = self.accelerator.unwrap_model(self.model)
        step = self.state.global_step
        if isinstance(self.teacher, EMATeacher) and step % self.args.sync_steps == 0:
            self.teacher.update(student)
        if self.drift is not None and step % self.args.drift_probe_every == 0:
            with self.accelerator.autocast():
                drift = self._measure_drift(student)
            self._metrics["train"][PREFIX + "drift_kl"].append(drift)

    def _measure_drift(self, student: nn.Module) -> float:
        assert self.drift is not None
        if not self._is_sharded:
            return self.drift.measure(student)
        # Through the wrapper's forward, which materializes the shards.
        return self._forward_redirection(self.model_wrapped, student, self.drift.measure, student)

    # Checkpoints

    def create_model_card(  # type: ignore[override]  # TRL's signature, which is not transformers'
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md into the output folder: base model, recipe, metrics, drift (see `unisd.model_card`)."""
        if self.is_world_process_zero():
            write_model_card(str(self.args.output_dir), model_card(self, model_name, dataset_name, tags))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # First of all files: a checkpoint that was cut off before this one has no trainer state either, so it
        # cannot be resumed from with a teacher that starts anew.
        if isinstance(self.teacher, EMATeacher) and self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            save_teacher(self.teacher, os.path.join(self._get_output_dir(trial), folder), self.state.global_step)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # The one hook that every kind of resume passes (DeepSpeed and FSDP load their weights elsewhere), after the
        # trainer state is known and before the first step.
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and isinstance(self.teacher, EMATeacher):
            load_teacher(self.teacher, checkpoint, self.state.global_step)


class _AfterStep(TrainerCallback):
    """Calls the trainer after each optimizer step, before it logs and saves."""

    def __init__(self, trainer: UniSDTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._after_optimizer_step()


def _head_device(model: Any) -> torch.device:
    return model.get_output_embeddings().weight.device


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
