"""The trainers of `steps.py`, which share one model and differ in preset and loss, and one optimizer step of them.

Every peer is a `UniSDTrainer` and runs its `training_step`. The dense one differs in the two functions that the
trainer calls on hidden states, `unisd_loss` and `linear_logprobs`: here they are the formulas with [N, V] tensors, each
product made once (the package's `reference` makes some twice, so its time says nothing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from bench.peers import dense
from unisd import UniSDConfig, UniSDTrainer
from unisd.data.procedural import procedural_rows
from unisd.gemma3 import GEMMA3
from unisd.models import SMOLLM2, load_model
from unisd.presets import PRESETS, is_paper
from unisd.step import LossFunctions
from unisd_kernels import LinearLogProbs, LMHead, UniSDLoss, reference
from unisd_kernels.config import LossConfig
from unisd_kernels.reference.loss import reduce_per_token

TINY, RANDOM_1B = "tiny", "random-1b"
MODELS = (SMOLLM2, GEMMA3, TINY, RANDOM_1B)
# Of random weights, which need no download: two layers, for tests; and the shape of Llama-3.2-1B, for a GPU.
RANDOM: dict[str, dict[str, Any]] = {
    TINY: {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        # Wide enough that distributions differ by context.
        "initializer_range": 0.2,
    },
    RANDOM_1B: {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}
OURS, DENSE = "ours", "dense"
PEERS = (OURS, DENSE)
PLAIN = "plain"
NUM_AUXILIARY = 3
FRACTION = 0.25
# Every preset, and K = 3 for the most uncertain quarter of the sequences only.
VARIANTS: dict[str, dict[str, Any]] = {
    name: {"preset": name} for name, preset in PRESETS.items() if not is_paper(name) and preset.method == "unisd"
} | {
    f"{name}-q{FRACTION}": {"preset": name, "agreement_fraction": FRACTION}
    for name in ("agreement_token", "unisd_star")
}


def logits(hidden: torch.Tensor, head: LMHead, temperature: float) -> torch.Tensor:
    """[N, V]: the product in the operands' dtype, float32 after it."""
    if head.bias is not None or head.softcap is not None or head.logit_scale != 1.0:
        raise NotImplementedError("the dense loss here is of a head without bias, scale and soft cap")
    return dense.logits(hidden, head.active_weight, temperature, torch.float32)


def dense_linear_logprobs(
    hidden: torch.Tensor,
    head: LMHead,
    target_ids: torch.Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    **_: Any,
) -> LinearLogProbs:
    """`unisd_kernels.linear_logprobs`; [N, V] logits, and their softmax where the entropy is wanted."""
    z = logits(hidden, head, temperature)
    logsumexp = z.logsumexp(-1)
    entropy = logsumexp - torch.linalg.vecdot(z.softmax(-1), z) if return_entropy else None
    return LinearLogProbs(z.gather(-1, target_ids.unsqueeze(-1)).squeeze(-1) - logsumexp, logsumexp, entropy)


def dense_unisd_loss(
    student_hidden: torch.Tensor,
    student_head: LMHead,
    teacher_hidden: torch.Tensor,
    teacher_head: LMHead,
    target_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    auxiliary_hidden: Sequence[torch.Tensor] = (),
    auxiliary_head: None = None,
    negative_hidden: torch.Tensor | None = None,
    negative_head: None = None,
    token_weights: torch.Tensor | None = None,
    num_items: torch.Tensor | None = None,
    impl: None = None,
    workspace_bytes: None = None,
    **settings: Any,
) -> UniSDLoss:
    """`unisd_kernels.unisd_loss` as the trainer calls it; differentiated by autograd."""
    spec = LossConfig(**settings)
    if spec.clip_quantile is not None:
        raise NotImplementedError("the dense loss here has a constant cap only, as the presets have")

    def at_targets(log_probs: torch.Tensor) -> torch.Tensor:
        return log_probs.gather(-1, target_ids.unsqueeze(-1)).squeeze(-1)

    def entropy(log_probs: torch.Tensor) -> torch.Tensor:
        return -torch.linalg.vecdot(log_probs.exp(), log_probs)

    auxiliary = negative = spread = contrastive = features = None
    with torch.no_grad():
        if negative_hidden is not None:
            negative = dense_linear_logprobs(
                negative_hidden, teacher_head, target_ids, temperature=spec.temperature
            ).logprobs
        if auxiliary_hidden:
            views = [dense_linear_logprobs(hidden, teacher_head, target_ids).logprobs for hidden in auxiliary_hidden]
            auxiliary = torch.stack(views)
        teacher = logits(teacher_hidden, teacher_head, spec.temperature).log_softmax(-1)
        teacher_logprobs, teacher_entropy = at_targets(teacher), entropy(teacher)
    # Feature matching alone: the logits serve statistics only.
    in_logits = spec.divergence_weight > 0 or negative is not None
    with torch.set_grad_enabled(in_logits and torch.is_grad_enabled()):
        student = logits(student_hidden, student_head, spec.temperature).log_softmax(-1)
        divergence = reference.divergence_from_log_probs(student, teacher, spec.beta)
        student_logprobs = at_targets(student)
    student_entropy = entropy(student.detach())

    kept, clipped = divergence, torch.zeros_like(divergence, dtype=torch.bool)
    if spec.clip_cap is not None:
        kept, clipped = reference.clip_divergence(divergence, spec.clip_cap), divergence.detach() > spec.clip_cap
    weights = torch.ones_like(divergence)
    if auxiliary is not None:
        weights, spread = reference.agreement_weights(
            auxiliary,
            cu_seqlens,
            level=spec.agreement,
            statistic=spec.agreement_statistic,
            gamma=spec.agreement_gamma,
        )
    if token_weights is not None:
        weights = weights * token_weights
    by = spec.resolved_weight_normalization(auxiliary is not None)
    terms = {"divergence": reduce_per_token(kept, cu_seqlens, spec.normalization, weights, by)}
    terms["contrastive"] = terms["feature"] = torch.zeros((), device=divergence.device)
    if negative is not None:
        contrastive = reference.contrastive_hinge(student_logprobs, teacher_logprobs, negative, spec.contrastive_margin)
        terms["contrastive"] = reduce_per_token(contrastive, cu_seqlens, spec.normalization)
    if spec.feature_weight > 0:
        features = reference.feature_distance(student_hidden, teacher_hidden)
        terms["feature"] = reduce_per_token(features, cu_seqlens, spec.normalization)
    local = cu_seqlens.numel() - 1 if spec.normalization == "sequence" else target_ids.numel()
    share = 1.0 if num_items is None else local / num_items
    loss = (
        spec.divergence_weight * terms["divergence"]
        + spec.contrastive_weight * terms["contrastive"]
        + spec.feature_weight * terms["feature"]
    )
    return UniSDLoss(
        loss * share,
        *((terms[name] * share).detach() for name in ("divergence", "contrastive", "feature")),
        divergence.detach(),
        clipped,
        weights,
        student_logprobs.detach(),
        teacher_logprobs,
        student_entropy,
        teacher_entropy,
        negative,
        None if contrastive is None else contrastive.detach(),
        None if features is None else features.detach(),
        auxiliary,
        spread,
    )


class ReplayingTrainer(UniSDTrainer):
    """Takes its completions from a list where it is given one."""

    completions: list[list[int]] | None = None

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        if self.completions is None:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return self.completions[: len(prompt_ids)]

    def rollout(self, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
        """Sample completions as a training step does."""
        self.model.train()
        return self._generate([row["prompt"] for row in rows])[1]

    def optimizer_step(self, rows: Sequence[dict[str, Any]]) -> torch.Tensor:
        """All of one step of `Trainer.train` on one micro-batch, logging apart; its loss."""
        self.current_gradient_accumulation_steps = 1
        loss = self.training_step(self.model, list(rows), None)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.model.zero_grad()
        self.state.global_step += 1
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        return loss


@dataclass(frozen=True)
class Workbench:
    """Model, tokenizer and rows of the trainers. Each takes `rows` as one batch, completions of `new_tokens` tokens."""

    model: Any
    tokenizer: Any
    rows: list[dict[str, Any]]
    new_tokens: int
    folder: str

    def trainer(self, variant: str, peer: str, completions: list[list[int]] | None = None) -> ReplayingTrainer:
        """Replays `completions`, after a first step of two tokens, which makes the optimizer's state; without them it
        samples. The learning rate is 0: all work is done and no weight moves, so every peer sees the same model
        in every round."""
        config = UniSDConfig(
            self.folder,
            **VARIANTS[variant],
            num_auxiliary=NUM_AUXILIARY,
            sync_steps=1,
            per_device_train_batch_size=len(self.rows),
            gradient_accumulation_steps=1,
            max_steps=1,
            learning_rate=0.0,
            max_completion_length=self.new_tokens,
            # No sequence ends early: every rollout is the same work.
            generation_kwargs={"min_new_tokens": self.new_tokens},
            drift_probe_every=0,
            prompt_frame="given",  # see `rollout`, and the rows' own remark
            save_strategy="no",
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=next(self.model.parameters()).device.type == "cpu",
            disable_tqdm=True,
        )
        trainer = ReplayingTrainer(
            model=self.model,
            args=config,
            train_dataset=Dataset.from_list(self.rows),
            processing_class=self.tokenizer,
        )
        if peer == DENSE:
            trainer.step.functions = LossFunctions(dense_unisd_loss, dense_linear_logprobs)
        trainer.create_optimizer_and_scheduler(num_training_steps=1)
        if completions is not None:
            trainer.completions = [completions[0][:2]]
            trainer.optimizer_step(self.rows[:1])
            trainer.completions = completions
        return trainer


def make_workbench(
    name: str,
    device: torch.device,
    batch_size: int,
    new_tokens: int,
    folder: str,
    dtype: torch.dtype | None = None,
) -> Workbench:
    """A model with LoRA as in the demo, by default float32 on a CPU and bfloat16 on an accelerator; rows are the demo's
    tasks of one step, as plain text: the chat template's system prompt would be most of each context."""
    disable_progress_bar()
    rows = fresh_rows(batch_size, 0)
    torch.manual_seed(0)
    # In a test of two layers the two devices shall agree to more digits than bfloat16 has.
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" or name == TINY else torch.bfloat16
    if name in RANDOM:
        # A billion numbers are drawn where they are needed; of the small one the two devices shall have the same.
        drawn_on = torch.device("cpu") if name == TINY else device
        model, tokenizer = _random(RANDOM[name], [row["auxiliary_prompts"][0] for row in rows], dtype, drawn_on)
    else:
        model, tokenizer = load_model(name, dtype=dtype)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return Workbench(get_peft_model(model.to(device), lora), tokenizer, rows, new_tokens, folder)


def fresh_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of the demo's tasks of one step, as plain text; others for each seed."""
    rows = []
    for row in procedural_rows(count, seed=seed, num_steps=1, num_auxiliary=NUM_AUXILIARY):
        views = {view: row[view][0]["content"] for view in ("prompt", "teacher_prompt", "negative_prompt")}
        rows.append({**views, "auxiliary_prompts": [messages[0]["content"] for messages in row["auxiliary_prompts"]]})
    return rows


def _random(settings: dict[str, Any], texts: list[str], dtype: torch.dtype, drawn_on: torch.device) -> tuple[Any, Any]:
    """A model of random weights, and a tokenizer of the words in `texts`."""
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<eos>", "<unk>"]
    backend.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=256, special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    config = LlamaConfig(**settings, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    with drawn_on:
        return AutoModelForCausalLM.from_config(config, dtype=dtype), tokenizer
