"""A tiny model in a folder, and the settings of a run of two steps on it."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from pathlib import Path

import pytest

from tests.evaluation.conftest import make_model, tokenizer  # noqa: F401


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that `unisd train` prepares on its way stay out of the user's cache."""
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("base")
    make_model(0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run_flags(base: Path, tmp_path: Path) -> list[str]:
    """Flags of a run of one step."""
    settings = {
        "model_name_or_path": base,
        "procedural_rows": 4,
        "procedural_steps": 1,
        "preset": "plain",
        "output_dir": tmp_path / "run",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 4,
        "bf16": "false",
        "use_cpu": "true",
        "gradient_checkpointing": "false",
        "lora_r": 2,
        "drift_probe_every": 0,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]
