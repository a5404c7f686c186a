"""README.md and the settings of a run: what a reader of the model's folder learns."""

from __future__ import annotations

import pytest
import yaml

from tests.trainer.tiny_run import PROBE, llama, lora, trainer
from unisd.models import FETCHED, SMOLLM2


def metadata_of(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


@pytest.mark.parametrize(
    ("name", "metadata", "shown"),
    [
        ("someone/model", "someone/model", "[someone/model](https://huggingface.co/someone/model)"),
        (f"/home/someone/.cache/{SMOLLM2}", FETCHED[SMOLLM2].hub_id, f"[{FETCHED[SMOLLM2].hub_id}]("),
        ("/models/mine", None, "`mine`"),
        ("", None, "`LlamaForCausalLM built in Python`"),
    ],
)
def test_the_base_model_is_named(name: str, metadata: str | None, shown: str, tmp_path):
    model = llama()
    model.config._name_or_path = name
    trainer(tmp_path, model, preset="plain", peft_config=lora()).create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert metadata_of(card).get("base_model") == metadata
    assert f"A PEFT adapter for {shown}" in card
    assert "None" not in card


def test_recipe_metrics_and_drift_are_told(tmp_path):
    settings = {"max_steps": 2, "drift_probe_every": 1, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.5}
    run = trainer(tmp_path, preset="clip", clip_cap=37.5, drift_probe=PROBE, **settings)
    run.train()
    card = (tmp_path / "checkpoint-2" / "README.md").read_text()
    assert (tmp_path / "README.md").read_text() == card
    rows = {cells[1].strip(" `"): [cell.strip() for cell in cells[2:-1]] for cells in map(_cells, card.splitlines())}
    assert "Preset `clip`; 2 optimizer steps" in card
    assert rows["clip_cap"] == ["37.5"]
    assert rows["temperature"] == ["0.7"]
    logged = {entry["step"]: entry for entry in run.state.log_history if "loss" in entry}
    assert rows["loss"] == [f"{logged[1]['loss']:.4g} (step 1)", f"{logged[2]['loss']:.4g} (step 2)"]
    drift = [entry["unisd/drift_kl"] for entry in run.state.log_history if "unisd/drift_kl" in entry]
    assert f"{drift[-1]:.4g} at step 2" in card
    assert drift[-1] > 0
    assert set(metadata_of(card)["tags"]) >= {"unisd", "trl"}


def test_a_full_fine_tuning_is_no_adapter_and_nothing_is_made_up(tmp_path):
    trainer(tmp_path, preset="plain").create_model_card(model_name="mine", dataset_name="rows", tags=["mine-too"])
    card = (tmp_path / "README.md").read_text()
    assert metadata_of(card)["library_name"] == "transformers"
    assert "mine-too" in metadata_of(card)["tags"]
    assert "A fine-tuned version of `LlamaForCausalLM built in Python`" in card
    assert "on `rows`." in card
    assert "Nothing was logged." in card
    assert "Not measured." in card


def test_the_settings_are_in_the_folder_from_the_start(tmp_path):
    run = trainer(tmp_path, preset="clip")
    run.train()
    settings = yaml.safe_load((tmp_path / "unisd_config.yaml").read_text())
    assert settings["preset"] == "clip"
    assert settings["clip_cap"] == run.args.clip_cap
    assert settings["lr_scheduler_type"] == "constant"
    assert not settings.keys() & {"hub_token", "resume_from_checkpoint"}


def _cells(line: str) -> list[str]:
    return line.split("|") if line.startswith("|") else ["", "", "", ""]
