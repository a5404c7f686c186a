"""The README's example is code that runs, and its names exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import torch

import unisd_kernels
from bench.__main__ import table
from bench.cases import CASES

ROOT = Path(__file__).parents[2]


def test_the_example_runs_and_gives_gradients():
    text = (ROOT / "README.md").read_text()
    example = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "unisd_loss(" in block)
    layer = torch.nn.Linear(8, 31, bias=False)
    model = SimpleNamespace(get_output_embeddings=lambda: layer, config=SimpleNamespace())
    hidden = [torch.randn(2, 5, 8) for _ in range(6)]
    student_hidden = hidden[0].requires_grad_()
    names = {
        "model": model,
        "mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "completion_ids": torch.randint(0, 31, (2, 5)),
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
    from unisd.presets import PRESETS

    text = (ROOT / "README.md").read_text()
    table = text[text.index("## The mechanisms") : text.index("## The recipe")]
    named = set(re.findall(r"`(\w+)`", table))
    assert set(PRESETS) <= named
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / link).exists(), link


def test_public_names_are_documented():
    for name in unisd_kernels.__all__:
        if name not in ("__version__", "reference"):
            assert getattr(unisd_kernels, name).__doc__, name


def test_figures_are_those_of_the_result_files():
    text = (ROOT / "README.md").read_text()
    result = json.loads((ROOT / "bench" / "results" / "cpu_unisd_star.json").read_text())
    printed = table(CASES["unisd_star_cpu"], result["rows"]).splitlines()[2:]
    assert "\n".join(printed) in text
    demo = json.loads((ROOT / "bench" / "results" / "demo_cpu.json").read_text())
    for run in demo["runs"]:
        before, after = run["before"], run["after"]
        line = (
            f"| {run['seed']} | {before['perplexity']:.3f} -> {after['perplexity']:.3f} "
            f"| {before['accuracy']:.0%} -> {after['accuracy']:.0%} "
            f"| {run['retention']['kl']:.3f} nats a token | {run['minutes']:.1f} |"
        )
        assert line in text


def test_the_smaller_tables_are_those_of_the_result_files():
    text = (ROOT / "README.md").read_text()

    def result(name):
        return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())

    for name in ("cpu_qwen2.5-0.5b", "cpu_gemma3-270m"):
        for row in result(name)["rows"]:
            if row["peer"] == "unisd_kernels":
                memory = f"{row['extra_peak_bytes'] / 1e6:.0f} MB"
                assert f"| {row['divergence']} | {row['ratio_to_floor']:.2f} | {memory} |" in text
    rows = [row for row in result("numerics_cpu")["rows"] if row["divergence"] == "forward KL"]
    for start in range(0, len(rows), 4):
        group = rows[start : start + 4]
        cells = " | ".join(f"{row['largest']:.0e}" for row in group)
        assert f"| {group[0]['mean']:.0e} | {cells} |" in text
    average = result("ema_cpu")
    progress = {row["teacher"]: row["progress"] for row in average["errors"]}
    ratios = {row["update"]: row["ratio"] for row in average["times"]}
    for update, teacher in (
        ("bfloat16 teacher: _foreach_lerp_ (stalls)", "naive bfloat16"),
        ("bfloat16 teacher: ema_update_, compensation", "compensation"),
        ("bfloat16 teacher: ema_update_, stochastic", "stochastic"),
        ("float32 teacher, float32 student: ema_update_", "float32 shadow"),
    ):
        assert f"| {ratios[update]:.2f} | {progress[teacher]:.2f} |" in text
