"""A tiny model, tokenizer, dataset and trainer with known rollouts, for the tests of this folder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from unisd.config import UniSDConfig
from unisd.trainer import UniSDTrainer

VOCAB_SIZE = 64
PAD, EOS = 0, 1
NUM_ROWS = 4

PROBE = [
    {"prompt": "w5 w6 w7", "completion": "w8 w9"},
    {"prompt": [{"role": "user", "content": "w10 w11"}], "completion": "w12 w13 w14"},
    {"prompt": "w20", "completion": "w21"},
]


def with_the_newest_trl(test):
    """For a test that costs as much as many others: `make test` runs it once, `make test-all` with both ends of TRL."""
    is_newest = tuple(map(int, trl.__version__.split(".")[:2])) >= (1, 16)
    return test if is_newest else pytest.mark.exhaustive(test)


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, VOCAB_SIZE))]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    result.chat_template = (
        "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}w3{% endif %}"
    )
    return result


def llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    """Weights wide enough that distributions differ by context; untied, so that head and embedding are apart."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides}))


def gpt2() -> GPT2LMHeadModel:
    """Learned absolute positions: here padding shifts a row unless positions are given."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return GPT2LMHeadModel(config)


def words(start: int, count: int) -> str:
    return " ".join(f"w{3 + (start + i) % (VOCAB_SIZE - 3)}" for i in range(count))


def rows(num_auxiliary: int = 3, count: int = NUM_ROWS) -> list[dict]:
    """Rows whose contexts all have different lengths."""
    return [
        {
            "prompt": words(5 * i, 2 + i),
            "teacher_prompt": words(7 * i + 1, 4 + (3 * i) % 5),
            "auxiliary_prompts": [words(11 * i + 13 * k, 3 + (i + 2 * k) % 4) for k in range(num_auxiliary)],
            "negative_prompt": words(17 * i + 3, 3 + (2 * i) % 3),
        }
        for i in range(count)
    ]


def dataset(items: list[dict] | None = None) -> Dataset:
    return Dataset.from_list(rows() if items is None else items)


def completion_of(prompt: list[int]) -> list[int]:
    """The rollout of a prompt: 2 to 5 tokens that depend on it, ended by EOS."""
    start, length = sum(prompt), 1 + sum(prompt) % 4
    return [*(3 + (start * (i + 1)) % (VOCAB_SIZE - 3) for i in range(length)), EOS]


class FixedRollouts(UniSDTrainer):
    """Generates `completion_of(prompt)`."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        return [completion_of(ids) for ids in prompt_ids]


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def config(folder, **overrides) -> UniSDConfig:
    settings = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": 1,
        "max_completion_length": 6,
        "per_device_train_batch_size": NUM_ROWS,
        "gradient_accumulation_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
        "drift_probe_every": 0,
        # The template of the tiny tokenizer would only make every expected prompt longer.
        "prompt_frame": "given",
    }
    return UniSDConfig(str(folder), **{**settings, **overrides})


def trainer(folder, model=None, *, items=None, cls=FixedRollouts, drift_probe=None, peft_config=None, **overrides):
    return cls(
        model=llama() if model is None else model,
        args=config(folder, **overrides),
        train_dataset=dataset(items),
        processing_class=tokenizer(),
        peft_config=peft_config,
        drift_probe=drift_probe,
    )


def lora(**overrides):
    from peft import LoraConfig

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.0}
    return LoraConfig(**{**settings, **overrides})


def perturb(model, scale: float = 0.05, seed: int = 1) -> None:
    """Move every trained weight, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def losses(run) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def logged(run, name: str) -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


def hidden_of(model, context: list[int], completion: list[int]) -> torch.Tensor:
    """[T, H] last hidden states before each token of the completion: one row, no padding, through the whole model."""
    ids = torch.tensor([[*context, *completion]])
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    return hidden[0, len(context) - 1 : -1]


def tokenized(prompt) -> list[int]:
    return tokenizer()(text=prompt)["input_ids"]


def reference_inputs(model, items: list[dict], num_auxiliary: int, negative: bool, teacher=None, keep=None):
    """What the trainer has to hand to the loss, from unpadded passes of one row each.

    Args:
        teacher: the model that scores; None for the student itself.
        keep: per row, which completion tokens count; None for all.
    """
    from unisd_kernels import LMHead
    from unisd_kernels.config import LossInputs

    scorer = model if teacher is None else teacher
    completions = [completion_of(tokenized(item["prompt"])) for item in items]
    kept = [[True] * len(c) for c in completions] if keep is None else keep

    def view(source, prompts):
        parts = [
            hidden_of(source, tokenized(prompt), completion)[torch.tensor(mask)]
            for prompt, completion, mask in zip(prompts, completions, kept, strict=True)
        ]
        return torch.cat(parts)

    with torch.no_grad():
        teacher_hidden = view(scorer, [item["teacher_prompt"] for item in items])
        auxiliary = tuple(view(scorer, [item["auxiliary_prompts"][k] for item in items]) for k in range(num_auxiliary))
        negative_hidden = view(scorer, [item["negative_prompt"] for item in items]) if negative else None
    ids = [
        token for c, mask in zip(completions, kept, strict=True) for token, used in zip(c, mask, strict=True) if used
    ]
    lengths = torch.tensor([0, *(sum(mask) for mask in kept)])
    return LossInputs(
        student_hidden=view(model, [item["prompt"] for item in items]),
        student_head=LMHead(model.get_output_embeddings().weight),
        teacher_hidden=teacher_hidden,
        teacher_head=LMHead(scorer.get_output_embeddings().weight).detach(),
        target_ids=torch.tensor(ids),
        cu_seqlens=lengths.cumsum(0).int(),
        auxiliary_hidden=auxiliary,
        negative_hidden=negative_hidden,
    )


def reference_spec(args: UniSDConfig):
    from unisd_kernels.config import LossConfig

    # With all of its terms, a head that no term uses has a gradient of zeros, as in training.
    settings = {**args.loss_settings(), "return_statistics": True}
    return LossConfig(**{name: value for name, value in settings.items() if name not in ("impl", "workspace_bytes")})


def with_mixture(inputs, args: UniSDConfig):
    """The inputs of the loss with the mixture as the teacher, made by hand, and without views that it alone reads."""
    teacher, student = inputs.teacher_hidden, inputs.student_hidden.detach()
    away = {"contrastive": inputs.negative_hidden, "pmi": student}.get(args.teacher_mixture)
    if args.teacher_mixture == "consensus":
        teacher = torch.stack([teacher, *inputs.auxiliary_hidden]).mean(0)
    elif away is not None:
        teacher = teacher + args.mixture_alpha * (teacher - away)
    return replace(
        inputs,
        teacher_hidden=teacher,
        auxiliary_hidden=inputs.auxiliary_hidden if args.uses_agreement else (),
        negative_hidden=inputs.negative_hidden if args.uses_contrastive else None,
    )


def reference_step(model, items: list[dict], args: UniSDConfig, teacher=None, **options):
    """(loss, gradients by parameter) of the dense oracle."""
    from unisd_kernels import reference

    num_auxiliary = args.num_auxiliary if args.reads_auxiliary else 0
    inputs = reference_inputs(model, items, num_auxiliary, args.reads_negative, teacher, **options)
    loss = reference.unisd_loss(with_mixture(inputs, args), reference_spec(args)).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), gradients


def assert_same_gradients(actual: dict, expected: dict, tolerance: float = 2e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-6)
        error = (actual[name] - gradient).abs().max() / scale
        assert error < tolerance, f"{name}: relative error {error:.2e}"
