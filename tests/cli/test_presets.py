"""`unisd presets`, what `*_paper` sets outside of the trainer, and what docs/training.md says of gamma."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from unisd.cli import main
from unisd.cli.train import parse
from unisd.presets import PAPER_LORA, PRESETS, paper_micro_batch
from unisd.run.settings import resolved_settings, write_settings
from unisd_kernels import agreement_weights

ROOT = Path(__file__).parents[2]


def test_the_list_and_each_preset_fit_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in ([], *([name] for name in PRESETS)):
        assert main(["presets", *arguments]) == 0
        said = capsys.readouterr().out
        assert max(map(len, said.splitlines())) <= 80, arguments
        assert set(PRESETS) <= set(said.split()) if not arguments else f"{arguments[0]}: " in said
    assert main(["presets", "unisd_stra"]) == 2
    assert "did you mean unisd_star" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_a_paper_preset_sets_model_and_batch_and_is_beaten(base: Path, tmp_path: Path):
    flags = ["--model_name_or_path", str(base), "--output_dir", str(tmp_path), "--bf16", "false"]
    flags += ["--use_cpu", "true"]
    settings = parse([*flags, "--preset", "unisd_star_paper"])
    assert {name: getattr(settings.model, name) for name in PAPER_LORA} == PAPER_LORA
    assert (settings.config.per_device_train_batch_size, settings.config.gradient_accumulation_steps) == (8, 4)
    assert settings.data.contexts == "retrieval"
    assert parse([*flags, "--preset", "plain_paper"]).config.per_device_train_batch_size == 16
    given = ["--lora_r", "8", "--per_device_train_batch_size", "2", "--contexts", "random", "--dataset", "a/b"]
    beaten = parse([*flags, "--preset", "unisd_star_paper", *given, "--max_prompt_length", "100"])
    assert (beaten.model.lora_r, beaten.config.per_device_train_batch_size) == (8, 2)
    assert (beaten.data.contexts, beaten.config.max_prompt_length) == ("random", 100)
    assert beaten.model.lora_alpha == 128
    file = write_settings(tmp_path, resolved_settings(settings.data, settings.config, settings.model))
    written = yaml.safe_load(file.read_text())
    assert written["lora_r"] == 64
    assert written["contexts"] == "retrieval"
    assert written["per_device_train_batch_size"] == 8
    assert written["agreement_gamma"] == 0.001


@pytest.mark.parametrize(
    ("parameters", "batch"), [(0.49e9, 16), (1.54e9, 8), (3.09e9, 8), (4.3e9, 8), (7.6e9, 4), (8.03e9, 4)]
)
def test_the_micro_batch_of_the_paper_by_size(parameters: float, batch: int):
    assert paper_micro_batch("plain_paper", int(parameters)) == batch
    assert paper_micro_batch("unisd_star_paper", int(parameters)) == batch // 2


def test_the_weights_that_the_docs_give_for_gamma():
    """By the kernels themselves: the least weight, and that at the 0.95 quantile, of one token far from all others."""
    table = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| `(\w+)` \|$", _gamma_section(), re.MULTILINE)
    assert len(table) == 3
    for gamma, least, at_quantile, preset in table:
        assert PRESETS[preset].agreement_gamma == float(gamma)
        # Two contexts, 101 tokens; their variances rise evenly, but the last is out of all proportion.
        spread = torch.arange(1.0, 102.0, dtype=torch.float64).sqrt()
        spread[-1] = 1e3
        logprobs = torch.stack([-spread, spread]) - 2e3
        weights = agreement_weights(logprobs, torch.tensor([0, 101]), gamma=float(gamma)).weights
        assert weights.min().item() == pytest.approx(float(least), abs=5e-4)
        assert weights[95].item() == pytest.approx(float(at_quantile), abs=5e-4)


def _gamma_section() -> str:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    return text[text.index("**What gamma does.**") :]
