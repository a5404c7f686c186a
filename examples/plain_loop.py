"""UniSD* in a PyTorch loop of your own: rollouts, gradient accumulation, mixed precision.

    python examples/plain_loop.py

Lines marked `# unisd` are this package's; everything else is the loop you have.
"""

from __future__ import annotations

import copy

import torch

from unisd import completion_batch, hidden_rows  # unisd
from unisd_kernels import LMHead, unisd_loss  # unisd

ACCUMULATION = 2


def train(model, tokenizer, rows, *, steps=3, batch_size=2, learning_rate=2e-5, max_new_tokens=24, amp=None):
    """Losses of `steps` optimizer steps; `amp` is a dtype for autocast, or None."""
    device = model.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    teacher = copy.deepcopy(model).eval().requires_grad_(False)  # fixed; `unisd_kernels.ema_update_` moves it
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    losses = []
    for step in range(steps):
        total = 0.0
        for micro in range(ACCUMULATION):
            batch = batches[(step * ACCUMULATION + micro) % len(batches)]
            completions = rollout(model, tokenizer, [row["prompt"] for row in batch], max_new_tokens)

            def view(prompts, completions=completions):
                return completion_batch(tokenizer, prompts, completions, device=device)  # unisd

            student = view([row["prompt"] for row in batch])
            others = [view([row["teacher_prompt"] for row in batch]), view([row["negative_prompt"] for row in batch])]
            others += [view([row["auxiliary_prompts"][k] for row in batch]) for k in range(2)]
            with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                with torch.no_grad():
                    scored, negative, *auxiliary = [hidden_rows(teacher, other) for other in others]  # unisd
                result = unisd_loss(  # unisd: [N, H] states of the N completion tokens, never [N, V] logits
                    hidden_rows(model, student),
                    LMHead.from_model(model, verify=step + micro == 0),  # checked against the model's logits once
                    scored,
                    LMHead.from_model(teacher, verify=False),
                    student.target_ids,
                    student.cu_seqlens,
                    auxiliary_hidden=auxiliary,
                    negative_hidden=negative,
                    temperature=0.7,
                    agreement_gamma=0.001,
                    contrastive_weight=0.01,
                    contrastive_margin=0.1,
                    feature_weight=0.01,
                    # The gradient is that of the whole step, however it is cut into micro-batches.
                    num_items=ACCUMULATION * batch_size,
                )
            result.loss.backward()
            total += result.loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        print(f"step {step + 1}: loss {total:.4f}")
    return losses


def rollout(model, tokenizer, prompts, max_new_tokens):
    """Sample one completion of each prompt."""
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=True, temperature=0.7, top_k=0)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    from unisd import load_model
    from unisd.data.procedural import procedural_rows

    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    model, tokenizer = load_model("smollm2-135m-instruct", device="cuda" if on_gpu else "cpu")
    train(model.train(), tokenizer, procedural_rows(12, num_auxiliary=2), amp=torch.bfloat16 if on_gpu else None)
