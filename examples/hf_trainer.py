"""UniSD in `transformers.Trainer`: its loss is one function of ours.

    python examples/hf_trainer.py

Lines marked `# unisd` are this package's. The completions are given here (off-policy); rollouts, K contexts and
checkpoints of a moving-average teacher are what `unisd.UniSDTrainer` adds.
"""

from __future__ import annotations

from transformers import Trainer, TrainingArguments

from unisd import completion_batch, self_distillation_loss  # unisd


class SelfDistillationTrainer(Trainer):
    """`Trainer` with another loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Batches without labels have no num_items_in_batch: `Trainer` then takes the mean over the micro-batches.
        return self_distillation_loss(model, **inputs, temperature=0.7, clip_cap=10.0).loss  # unisd


def make_trainer(model, tokenizer, rows, folder, **settings):
    """A trainer of rows with `prompt`, `teacher_prompt` and `completion`."""

    def collate(batch):
        completions = [row["completion"] for row in batch]
        views = {"student": "prompt", "teacher": "teacher_prompt"}
        return {
            name: completion_batch(tokenizer, [row[column] for row in batch], completions, device=model.device)  # unisd
            for name, column in views.items()
        }

    arguments = TrainingArguments(
        str(folder), remove_unused_columns=False, report_to="none", save_strategy="no", **settings
    )
    return SelfDistillationTrainer(model, arguments, data_collator=collate, train_dataset=rows)


if __name__ == "__main__":
    from unisd import load_model
    from unisd.data.procedural import procedural_rows

    model, tokenizer = load_model("smollm2-135m-instruct")
    rows = procedural_rows(16, num_auxiliary=0)
    make_trainer(
        model, tokenizer, rows, "runs/hf_trainer", max_steps=4, per_device_train_batch_size=4, logging_steps=1
    ).train()
