"""The README's example is code that runs, and its names exist."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import unisd_kernels
from tests.heads import tiny_models

ROOT = Path(__file__).parents[2]


def test_the_example_runs_and_gives_gradients():
    text = (ROOT / "README.md").read_text()
    example = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "unisd_loss(" in block)
    model = tiny_models.model("llama")
    layer = model.lm_head
    hidden = [torch.randn(2, 5, 32) for _ in range(6)]
    student_hidden = hidden[0].requires_grad_()
    names = {
        "model": model,
        "mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "completion_ids": torch.randint(0, tiny_models.VOCAB_SIZE, (2, 5)),
        "student_hidden": student_hidden,
        "teacher_hidden": hidden[1],
        "negative_hidden": hidden[2],
        "auxiliary_hidden": hidden[3:],
    }
    exec(example, names)
    assert names["result"].loss > 0
    assert student_hidden.grad[0, :3].abs().min(dim=-1).values.max() > 0
    assert not student_hidden.grad[0, 3:].any()
    assert layer.weight.grad.abs().max() > 0


def test_presets_and_links_exist():
    from unisd.presets import PRESETS, is_paper

    text = (ROOT / "README.md").read_text()
    table = text[text.index("## The mechanisms") : text.index("## The recipe")]
    named = set(re.findall(r"`(\w+)`", table))
    assert {name for name in PRESETS if not is_paper(name)} <= named
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / link).exists(), link


def test_public_names_are_documented():
    for name in unisd_kernels.__all__:
        if name not in ("__version__", "reference"):
            assert getattr(unisd_kernels, name).__doc__, name
