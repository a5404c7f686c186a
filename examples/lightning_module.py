"""UniSD as a Lightning module (`pip install lightning`).

    python examples/lightning_module.py

Lines marked `# unisd` are this package's.
"""

from __future__ import annotations

import lightning
import torch

from unisd import completion_batch, self_distillation_loss  # unisd


class SelfDistillation(lightning.LightningModule):
    """A model that learns from itself; batches are lists of rows with prompt, teacher_prompt and completion."""

    def __init__(self, model, tokenizer, learning_rate=2e-5, **settings):
        super().__init__()
        self.model, self.tokenizer, self.learning_rate, self.settings = model, tokenizer, learning_rate, settings

    def view(self, batch, column):
        prompts, completions = [row[column] for row in batch], [row["completion"] for row in batch]
        return completion_batch(self.tokenizer, prompts, completions, device=self.device)  # unisd

    def training_step(self, batch, index):
        student, teacher = self.view(batch, "prompt"), self.view(batch, "teacher_prompt")
        result = self_distillation_loss(self.model, student, teacher, **self.settings)  # unisd
        self.log("loss", result.loss, prog_bar=True, batch_size=len(batch))
        return result.loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def fit(model, tokenizer, rows, *, batch_size=4, **settings):
    """Train on the rows once and return the Lightning trainer, whose `callback_metrics` hold the last loss."""
    loader = torch.utils.data.DataLoader(rows, batch_size=batch_size, collate_fn=list)
    trainer = lightning.Trainer(
        logger=False, enable_checkpointing=False, enable_model_summary=False, log_every_n_steps=1, **settings
    )
    trainer.fit(SelfDistillation(model, tokenizer, temperature=0.7), loader)
    return trainer


if __name__ == "__main__":
    from unisd import load_model
    from unisd.data.procedural import procedural_rows

    model, tokenizer = load_model("smollm2-135m-instruct")
    rows = procedural_rows(16, num_auxiliary=0)
    print(
        {
            name: float(value)
            for name, value in fit(model.train(), tokenizer, rows, max_epochs=1).callback_metrics.items()
        }
    )
