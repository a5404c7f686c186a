"""A model with a vision tower is trained on text: with its tokenizer, or with the processor that holds it."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, ProcessorMixin

from tests.trainer.tiny_run import (
    EOS,
    PAD,
    VOCAB_SIZE,
    FixedRollouts,
    Gradients,
    assert_same_gradients,
    config,
    dataset,
    lora,
    losses,
    reference_step,
    rows,
    tokenizer,
)
from unisd.text_tokenizer import tokenizer_for


class Processor(ProcessorMixin):
    """A processor of images and text, with a tokenizer in it."""

    attributes = ["tokenizer"]  # noqa: RUF012
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer=None):
        self.tokenizer = tokenizer
        self.chat_template = None


def gemma3() -> Gemma3ForConditionalGeneration:
    torch.manual_seed(0)
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    settings = {"image_token_index": 63, "boi_token_index": 61, "eoi_token_index": 62, "mm_tokens_per_image": 4}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **settings))


def test_a_step_is_the_references(tmp_path):
    """Loss and gradients of Gemma3ForConditionalGeneration, given its processor, against the dense oracle."""
    model, gradients = gemma3(), Gradients()
    items = rows()
    args = config(tmp_path, preset="unisd_star", ema="none")
    expected_loss, expected = reference_step(model, items, args)
    run = FixedRollouts(
        model=model,
        args=args,
        train_dataset=dataset(items),
        processing_class=Processor(tokenizer()),
        callbacks=[gradients],
    )
    assert type(run.processing_class) is type(tokenizer())
    run.train()
    assert losses(run)[0] == pytest.approx(expected_loss, rel=1e-4)
    assert_same_gradients(gradients.steps[0], expected)
    assert not any("vision" in name for name in expected)


def test_lora_on_all_linear_layers(tmp_path):
    run = FixedRollouts(
        model=gemma3(),
        args=config(tmp_path, preset="plain"),
        train_dataset=dataset(),
        processing_class=Processor(tokenizer()),
        peft_config=lora(target_modules="all-linear"),
    )
    run.train()
    moved = [name for name, weight in run.model.named_parameters() if "lora_B" in name and weight.abs().max() > 0]
    assert moved
    assert all("language_model" in name for name in moved)


def test_what_holds_no_tokenizer_is_refused(tmp_path):
    for processor in (Processor(None), object()):
        with pytest.raises(TypeError, match="must be a tokenizer or a processor that holds one"):
            tokenizer_for(gemma3(), processor, config(tmp_path))
    with pytest.raises(ValueError, match="no name to load its tokenizer by"):
        tokenizer_for(gemma3(), None, config(tmp_path))
