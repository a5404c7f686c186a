"""What could only fail, or do nothing, after rollouts were paid is refused at construction."""

import pytest
import torch
from trl import DistillationTrainer

from tests.trainer import tiny_run
from unisd.trainer import UniSDTrainer

BATCH = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


def test_fewer_rows_than_one_step_are_refused_with_the_numbers(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"train_dataset has 7 rows, but one optimizer step takes 8 \(per_device_train_batch_size 2 x grad",
    ):
        tiny_run.trainer(tmp_path, preset="plain", items=tiny_run.rows(count=7), **BATCH)
    # The longer of prompt and teacher prompt has 4, 7, 5, 8, 6, 7, 8, 9 tokens.
    with pytest.raises(ValueError, match=r"has 3 rows \(after 5 were dropped\), but one optimizer step takes 8"):
        tiny_run.trainer(tmp_path, preset="plain", items=tiny_run.rows(count=8), max_prompt_length=6, **BATCH)


def test_a_remainder_is_said(tmp_path, caplog):
    settings = {"preset": "plain", "max_steps": -1, "num_train_epochs": 1, **BATCH}
    run = tiny_run.trainer(tmp_path, items=tiny_run.rows(count=11), **settings)
    assert (
        "each epoch leaves out 3 of 11 rows (drawn anew each time): it has 1 optimizer steps of 8 rows" in caplog.text
    )
    run.train()
    assert run.state.global_step == 1
    caplog.clear()
    tiny_run.trainer(tmp_path, items=tiny_run.rows(count=9), shuffle_dataset=False, **settings)
    assert "each epoch leaves out 1 of 9 rows (always the last)" in caplog.text
    caplog.clear()
    tiny_run.trainer(tmp_path, items=tiny_run.rows(count=8), **settings)
    assert "leaves out" not in caplog.text


def test_a_frozen_adapter_is_refused(tmp_path):
    from peft import PeftModel, get_peft_model

    get_peft_model(tiny_run.llama(), tiny_run.lora()).save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(tiny_run.llama(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter is frozen.*is_trainable=True"):
        tiny_run.trainer(tmp_path, frozen, preset="plain")
    trainable = PeftModel.from_pretrained(tiny_run.llama(), tmp_path / "adapter", is_trainable=True)
    tiny_run.trainer(tmp_path, trainable, preset="plain").train()
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        tiny_run.trainer(tmp_path, tiny_run.llama().requires_grad_(False), preset="plain")


def build(folder, tokenizer, **overrides):
    return UniSDTrainer(
        model=tiny_run.llama(),
        args=tiny_run.config(folder, preset="plain", **overrides),
        train_dataset=tiny_run.dataset(),
        processing_class=tokenizer,
    )


def test_a_tokenizer_without_end_is_refused(tmp_path):
    tokenizer = tiny_run.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"has no eos_token.*set tokenizer\.eos_token"):
        build(tmp_path, tokenizer)


def test_special_tokens_need_embeddings(tmp_path):
    tokenizer = tiny_run.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    with pytest.raises(ValueError, match=r"pad_token '<new>' has id 64, but the model has 64 embeddings"):
        build(tmp_path, tokenizer)


@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_an_empty_completion_counts_for_nothing(tmp_path, monkeypatch, normalization):
    """Equal to the reference with that sequence's tokens masked: a sequence with a loss of 0."""

    def rollouts(self, prompt_ids, *args, **kwargs):
        return [[] if len(ids) == 3 else tiny_run.completion_of(ids) for ids in prompt_ids]  # row 1 has 3 tokens

    monkeypatch.setattr(DistillationTrainer, "_generate_single_turn", rollouts)
    gradients = tiny_run.Gradients()
    run = build(tmp_path, tiny_run.tokenizer(), normalization=normalization)
    run.add_callback(gradients)
    with pytest.warns(UserWarning, match="the sampler returned 1 empty completions of 4"):
        run.train()
    items = tiny_run.rows()
    completions = [tiny_run.completion_of(tiny_run.tokenized(row["prompt"])) for row in items]
    keep = [[i != 1] * len(completion) for i, completion in enumerate(completions)]
    loss, expected = tiny_run.reference_step(tiny_run.llama(), items, run.args, keep=keep)
    assert tiny_run.losses(run)[0] == pytest.approx(loss, rel=1e-4)
    tiny_run.assert_same_gradients(gradients.steps[0], expected)


def test_only_empty_completions_give_no_gradient(tmp_path, monkeypatch):
    monkeypatch.setattr(
        DistillationTrainer, "_generate_single_turn", lambda self, prompts, *a, **k: [[] for _ in prompts]
    )
    gradients = tiny_run.Gradients()
    run = build(tmp_path, tiny_run.tokenizer())
    run.add_callback(gradients)
    with pytest.warns(UserWarning, match="4 empty completions of 4"):
        run.train()
    assert tiny_run.losses(run) == [0.0]
    assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients.steps[0].values())
