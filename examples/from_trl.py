"""From TRL's distillation trainers to UniSD's, line by line.

    python examples/from_trl.py distillation | sdft | gkd

Each pair of functions trains one model on one dataset, first with TRL's trainer, then with ours; a comment at the end
of a line of ours says what it was. What is not said stays: model, PEFT, rollouts (vLLM too), logging, checkpoints are
TRL's in both.
"""

from __future__ import annotations

import sys

from datasets import Dataset

from unisd import UniSDConfig, UniSDTrainer  # unisd


def distillation_with_trl(model, teacher_model, tokenizer, rows, folder, **settings):
    """Another model as the teacher, the student's own prompt."""
    from trl import DistillationConfig, DistillationTrainer

    args = DistillationConfig(str(folder), beta=0.0, temperature=0.7, **settings)
    dataset = Dataset.from_list([{"prompt": row["prompt"]} for row in rows])
    trainer = DistillationTrainer(
        model=model, teacher_model=teacher_model, args=args, train_dataset=dataset, processing_class=tokenizer
    )
    trainer.train()
    return trainer


def distillation_with_unisd(model, tokenizer, rows, folder, **settings):
    """The model itself as the teacher, under a richer context."""
    args = UniSDConfig(  # DistillationConfig
        str(folder),
        preset="unisd_star",  # new: which mechanisms; explicit settings beat it
        beta=0.0,  # the same; its default is 0 here, 1 there
        temperature=0.7,  # the same; its default is 0.7 here, 1 there
        **settings,
    )
    # new columns: teacher_prompt, auxiliary_prompts, negative_prompt (`unisd prepare` makes them)
    dataset = Dataset.from_list(rows)
    # teacher_model is gone: the teacher is the model, its moving average (ema=) or its base (teacher="base")
    trainer = UniSDTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    return trainer


def sdft_with_trl(model, tokenizer, rows, folder, **settings):
    """SDFT: the EMA of the model reads the demonstration."""
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    args = SDFTConfig(
        str(folder),
        distillation_mode="full_logits",
        distillation_alpha=1.0,
        distillation_is_clip=None,
        teacher_model_kind="ema",
        teacher_update_rate=0.02,
        teacher_sync_steps=1,
        num_generations=1,
        num_loss_tokens_to_skip=2,
        teacher_prompt_template="{prompt}\n\n{privileged_context}",
        temperature=0.7,
        **settings,
    )
    dataset = Dataset.from_list(
        [{"prompt": row["prompt"], "privileged_context": row["privileged_context"]} for row in rows]
    )
    trainer = SDFTTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    return trainer


def sdft_with_unisd(model, tokenizer, rows, folder, **settings):
    """The same; the divergence over the whole vocabulary costs no [N, V] logits here."""
    args = UniSDConfig(  # SDFTConfig
        str(folder),
        preset="sdft",  # distillation_mode="full_logits": always; teacher_model_kind="ema"; distillation_alpha=1 is
        beta=1.0,  # the reverse KL
        ema_decay=0.98,  # teacher_update_rate=0.02
        sync_steps=1,  # teacher_sync_steps
        skip_first_tokens=2,  # num_loss_tokens_to_skip
        teacher_template="{prompt}\n\n{privileged_context}",  # teacher_prompt_template
        temperature=0.7,  # the same
        **settings,  # num_generations: one completion a row; distillation_is_clip: rollouts need no correction
    )
    # the same columns; rows that are too long are dropped with a count, not truncated
    dataset = Dataset.from_list(
        [{"prompt": row["prompt"], "privileged_context": row["privileged_context"]} for row in rows]
    )
    trainer = UniSDTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    return trainer


def gkd_with_trl(model, teacher_model, tokenizer, rows, folder, **settings):
    """GKD: generalized Jensen-Shannon divergence to another model, partly on given replies (`lmbda`)."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    args = GKDConfig(str(folder), beta=0.5, temperature=0.7, lmbda=1.0, max_new_tokens=8, **settings)
    dataset = Dataset.from_list(
        [{"messages": [*row["prompt"], {"role": "assistant", "content": row["completion"]}]} for row in rows]
    )
    trainer = GKDTrainer(
        model=model, teacher_model=teacher_model, args=args, train_dataset=dataset, processing_class=tokenizer
    )
    trainer.train()
    return trainer


def gkd_with_unisd(model, tokenizer, rows, folder, **settings):
    """The base model with the demonstration in its context as the teacher."""
    args = UniSDConfig(  # GKDConfig
        str(folder),
        preset="gkd",  # teacher="base": the weights before training
        beta=0.5,  # the same
        temperature=0.7,  # the same
        max_completion_length=8,  # max_new_tokens
        **settings,  # lmbda: always 1, every completion is the student's own
    )
    # `messages` is cut in two: the reply is what the teacher is shown
    dataset = Dataset.from_list([{"prompt": row["prompt"], "privileged_context": row["completion"]} for row in rows])
    trainer = UniSDTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    return trainer


if __name__ == "__main__":
    from unisd import load_model
    from unisd.data.procedural import procedural_rows

    which = sys.argv[1] if len(sys.argv) == 2 else ""
    ours = {"distillation": distillation_with_unisd, "sdft": sdft_with_unisd, "gkd": gkd_with_unisd}
    if which not in ours:
        sys.exit(f"usage: python examples/from_trl.py {' | '.join(ours)}")
    model, tokenizer = load_model("smollm2-135m-instruct")
    rows = [{**row, "privileged_context": row["completion"]} for row in procedural_rows(16)]
    settings = {"max_steps": 2, "report_to": "none", "save_strategy": "no", "bf16": False, "logging_steps": 1}
    settings |= {"gradient_accumulation_steps": 1}
    if which != "gkd":
        settings["max_completion_length"] = 24
    ours[which](model, tokenizer, rows, f"runs/from_trl_{which}", use_cpu=True, **settings)
