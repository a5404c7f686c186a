"""Every example trains a tiny model: its loss falls, and its first value is that of the dense formulas."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from tests.trainer.tiny_run import llama, tokenizer, words
from unisd import completion_batch, self_distillation_loss
from unisd_kernels import LMHead, unisd_loss

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def conversation(text):
    return [{"role": "user", "content": text}]


def rows(count=4):
    return [
        {
            "prompt": conversation(words(5 * i, 3)),
            "teacher_prompt": conversation(words(7 * i, 6)),
            "auxiliary_prompts": [conversation(words(11 * i + 13 * k, 4)) for k in range(3)],
            "negative_prompt": conversation(words(17 * i, 5)),
            "privileged_context": words(3 * i, 4),
            "completion": words(9 * i + 2, 4),
        }
        for i in range(count)
    ]


def expected_loss(model, batch, teacher=None):
    """Forward KL at temperature 0.7 from the whole logits, mean over sequences of their token means."""
    texts = tokenizer()

    def logits(which, prompt, completion):
        ids = texts.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
        reply = [*texts(completion, add_special_tokens=False)["input_ids"], texts.eos_token_id]
        with torch.no_grad():
            return which(torch.tensor([[*ids, *reply]])).logits[0, len(ids) - 1 : -1].double() / 0.7

    means = []
    for row in batch:
        student = logits(model, row["prompt"], row["completion"]).log_softmax(-1)
        scored = logits(teacher or model, row["teacher_prompt"], row["completion"]).log_softmax(-1)
        means.append((scored.exp() * (scored - student)).sum(-1).mean().item())
    return sum(means) / len(means)


def test_given_completions_begin_at_the_dense_loss_and_fall(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    module = example("given_completions")
    read = module.read(file)
    model = llama()
    expected = expected_loss(model, read)
    losses = module.train(model, tokenizer(), read, learning_rate=1e-2, epochs=4)
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_hf_trainer_logs_the_dense_loss(tmp_path, accumulation):
    model = llama()
    expected = expected_loss(model, rows())
    trainer = example("hf_trainer").make_trainer(
        model,
        tokenizer(),
        rows(),
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_the_plain_loop_learns(amp):
    torch.manual_seed(0)
    losses = example("plain_loop").train(
        llama(), tokenizer(), rows(), steps=8, learning_rate=1e-2, max_new_tokens=6, amp=amp
    )
    assert all(loss > 0 for loss in losses)
    assert losses[-1] < losses[0]


def test_the_lightning_module_learns():
    pytest.importorskip("lightning")
    model = llama()
    expected = expected_loss(model, rows())
    trainer = example("lightning_module").fit(
        model, tokenizer(), rows(), max_epochs=1, accelerator="cpu", enable_progress_bar=False
    )
    assert trainer.callback_metrics["loss"].item() == pytest.approx(expected, rel=1e-5)


SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "logging_steps": 1,
    "disable_tqdm": True,
    "seed": 3,
}


@pytest.mark.parametrize("which", ["distillation", "sdft", "gkd"])
def test_both_sides_of_a_move_from_trl_train(which, tmp_path):
    module = example("from_trl")
    length = {} if which == "gkd" else {"max_completion_length": 6}
    teacher = [] if which == "sdft" else [llama(1)]
    model = llama()
    # TRL's SDFT makes its moving average by loading the model again.
    model.save_pretrained(tmp_path / "model")
    model.config._name_or_path = str(tmp_path / "model")
    theirs = getattr(module, f"{which}_with_trl")(
        model, *teacher, tokenizer(), rows(), tmp_path / "trl", **length, **SETTINGS
    )
    ours = getattr(module, f"{which}_with_unisd")(
        llama(), tokenizer(), rows(), tmp_path / "unisd", **length, **SETTINGS
    )
    for trainer in (theirs, ours):
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(logged) == 2
        assert all(0 < loss < 50 for loss in logged)


def test_a_view_of_other_completions_is_refused():
    texts, model = tokenizer(), llama()
    student = completion_batch(texts, ["w5 w6"], ["w7 w8"])
    other = completion_batch(texts, ["w5 w6"], ["w7 w9"])
    with pytest.raises(ValueError, match=r"teacher holds .* the same completions after every prompt"):
        self_distillation_loss(model, student, other)


def test_every_view_enters_the_loss_as_in_the_dense_formulas():
    texts, model, teacher = tokenizer(), llama(), llama(1)
    batch = rows(3)
    completions = [row["completion"] for row in batch]

    def view(prompts):
        return completion_batch(texts, prompts, completions)

    student = view([row["prompt"] for row in batch])
    others = {
        "teacher": view([row["teacher_prompt"] for row in batch]),
        "negative": view([row["negative_prompt"] for row in batch]),
        "auxiliary": [view([row["auxiliary_prompts"][k] for row in batch]) for k in range(2)],
    }
    settings = {"agreement_gamma": 0.5, "contrastive_weight": 0.3, "contrastive_margin": 0.1, "feature_weight": 0.2}
    result = self_distillation_loss(model, student, **others, teacher_model=teacher, **settings)
    result.loss.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()

    def states(which, one):
        hidden = which.model(input_ids=one.input_ids, attention_mask=one.attention_mask).last_hidden_state
        return hidden[one.predicts]

    with torch.no_grad():
        scored = states(teacher, others["teacher"])
        negative = states(teacher, others["negative"])
        auxiliary = [states(teacher, one) for one in others["auxiliary"]]
    dense = unisd_loss(
        states(model, student),
        LMHead(model.lm_head.weight),
        scored,
        LMHead(teacher.lm_head.weight.detach()),
        student.target_ids,
        student.cu_seqlens,
        auxiliary_hidden=auxiliary,
        negative_hidden=negative,
        impl="reference",
        **settings,
    )
    dense.loss.backward()
    assert result.loss.item() == pytest.approx(dense.loss.item(), rel=1e-5)
    torch.testing.assert_close(gradient, model.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("file", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_says_which_lines_are_ours(file):
    text = (EXAMPLES / file).read_text()
    imports = [line for line in text.splitlines() if re.match(r"from unisd(_kernels)? import", line)]
    assert imports
    assert all(line.endswith("# unisd") for line in imports)
    assert file in (EXAMPLES / "README.md").read_text()
