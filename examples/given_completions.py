"""UniSD off-policy: completions that were made elsewhere, from a JSONL file.

    python examples/given_completions.py [FILE]

A line of the file: {"prompt": ..., "teacher_prompt": ..., "completion": "..."}, the prompts being strings or chat
messages. Lines marked `# unisd` are this package's. The loss pulls the student towards the teacher along somebody
else's text: the gradient is exact, but the tokens are not the student's own, so its own mistakes are never corrected.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from unisd import completion_batch, self_distillation_loss  # unisd


def train(model, tokenizer, rows, *, batch_size=4, learning_rate=2e-5, epochs=1):
    """Losses of the optimizer steps."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=learning_rate)
    losses = []
    for _ in range(epochs):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            completions = [row["completion"] for row in batch]
            student, teacher = (
                completion_batch(tokenizer, [row[column] for row in batch], completions, device=model.device)  # unisd
                for column in ("prompt", "teacher_prompt")
            )
            loss = self_distillation_loss(model, student, teacher, temperature=0.7, clip_cap=10.0).loss  # unisd
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            print(f"step {len(losses)}: loss {losses[-1]:.4f}")
    return losses


def read(file):
    """The rows of a JSONL file."""
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]


if __name__ == "__main__":
    from unisd import load_model
    from unisd.data.procedural import procedural_rows

    torch.manual_seed(0)
    rows = read(sys.argv[1]) if len(sys.argv) > 1 else procedural_rows(16, num_auxiliary=0)
    model, tokenizer = load_model("smollm2-135m-instruct")
    train(model.train(), tokenizer, rows)
