"""`unisd train` from a YAML file, and `unisd eval` on what it saved: a tiny random model, the real commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.evaluation.conftest import make_model, tokenizer  # noqa: F401
from unisd.cli import main


@pytest.fixture
def base(tmp_path: Path, tokenizer) -> Path:  # noqa: F811
    make_model(0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def write_config(path: Path, base: Path) -> Path:
    config = path / "run.yaml"
    config.write_text(
        f"""
model_name_or_path: {base}
dataset: procedural
procedural_rows: 8
procedural_steps: [1]
preset: contrastive
output_dir: {path / "run"}
max_steps: 2
per_device_train_batch_size: 2
gradient_accumulation_steps: 1
max_completion_length: 8
learning_rate: 0.5
bf16: false
use_cpu: true
gradient_checkpointing: false
report_to: none
save_steps: 1
lora_r: 2
drift_probe_every: 0
logging_steps: 1
"""
    )
    return config


@pytest.mark.filterwarnings("ignore")
def test_train_then_eval(tmp_path: Path, base: Path, capsys):
    config = write_config(tmp_path, base)
    # The command line beats the file.
    assert main(["train", "--config", str(config), "--learning_rate", "0.01", "--preset", "sdft"]) == 0
    saved = tmp_path / "run"
    state = json.loads((saved / "checkpoint-2" / "trainer_state.json").read_text())
    assert max(entry.get("learning_rate", 0.0) for entry in state["log_history"]) <= 0.01
    weights = load_file(saved / "adapter_model.safetensors")
    trained = [weight for name, weight in weights.items() if "lora_B" in name]
    assert trained
    assert any(weight.abs().max() > 0 for weight in trained)

    output = tmp_path / "scores.json"
    command = ["eval", "procedural", "--model", str(saved), "--count", "2", "--steps", "1", "--output", str(output)]
    assert main(command) == 0
    assert json.loads(output.read_text())["overall"]["count"] == 2
    assert "perplexity" in capsys.readouterr().out
    assert main(["eval", "retention", "--model", str(saved)]) == 0
    assert "KL(base || trained)" in capsys.readouterr().out


def test_settings_that_do_not_exist_are_refused(tmp_path: Path, base: Path):
    config = write_config(tmp_path, base)
    config.write_text(config.read_text() + "agreement_gama: 0.1\n")
    with pytest.raises(ValueError, match="agreement_gama"):
        main(["train", "--config", str(config)])
    with pytest.raises(ValueError, match="preset must be one of"):
        main(["train", "--config", str(write_config(tmp_path, base)), "--preset", "unisd"])


def test_the_documented_file_is_valid():
    from trl import TrlParser

    from unisd.cli.train import DataArguments, ModelArguments
    from unisd.config import UniSDConfig

    path = Path(__file__).parents[2] / "docs" / "run.yaml"
    parser = TrlParser((DataArguments, UniSDConfig, ModelArguments))
    data, config, model = parser.parse_args_and_config(["--config", str(path), "--use_cpu", "true"])
    assert data.procedural_steps == [1, 2, 3]
    assert (config.preset, config.agreement_fraction, config.contrastive_weight) == ("unisd_star", 0.5, 0.01)
    assert (model.lora_r, model.use_peft) == (16, True)
