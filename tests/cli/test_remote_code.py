"""Code that comes with a model is not run unless asked, by any command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unisd.cli import main
from unisd.models import load_model

CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
class Config(GPT2Config):
    model_type = "stranger"
class Model(GPT2LMHeadModel):
    config_class = Config
class Tokens(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def stranger(base: Path, tmp_path: Path) -> Path:
    """A model whose configuration, model and tokenizer are code of its own, which leaves a file `ran`."""
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "code.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    config = json.loads((folder / "config.json").read_text())
    named = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config |= {"model_type": "stranger", "architectures": ["Model"], "auto_map": named}
    (folder / "config.json").write_text(json.dumps(config))
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    tokens |= {"tokenizer_class": "Tokens", "auto_map": {"AutoTokenizer": [None, "code.Tokens"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    (folder / "trainer_state.json").write_text('{"global_step": 1}')
    return folder


def test_no_command_runs_the_code_of_a_model_unasked(stranger: Path, base: Path, tmp_path: Path, capsys):
    rows, prepared, model = tmp_path / "rows.jsonl", str(tmp_path / "prepared"), str(stranger)
    rows.write_text("".join(json.dumps({"question": f"what is {i}", "answer": f"{i}"}) + "\n" for i in range(4)))
    made = ["prepare", str(rows), "-o", prepared, "--num_auxiliary", "0", "--negatives", "none", "--model"]
    assert main([*made, str(base)]) == 0
    run = ["--output_dir", str(tmp_path / "run"), "--bf16", "false"]
    for command in (
        ["train", "--model_name_or_path", model, *run],
        ["train", "--model_name_or_path", model, *run, "--preset", "plain_paper"],
        ["eval", "procedural", "--model", model],
        ["eval", "retention", "--model", str(base), "--base", model],
        [*made[:3], str(tmp_path / "other"), *made[4:], model],
        ["show", prepared, "--model", model],
        ["export", model, "-o", str(tmp_path / "out")],
    ):
        capsys.readouterr()
        assert main(command) == 2, command
        assert "contains custom code" in capsys.readouterr().err, command
        assert not (tmp_path / "ran").exists(), command
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(stranger)
    assert not (tmp_path / "ran").exists()


def test_asked_it_is_run(stranger: Path, tmp_path: Path):
    assert type(load_model(stranger, trust_remote_code=True)[0]).__name__ == "Model"
    assert (tmp_path / "ran").exists()
