"""Teachers follow a student that is moved or cast after they were made. The meta device stands for another device."""

import pytest
import torch
from peft import get_peft_model

from tests.trainer import tiny_run
from unisd import teachers
from unisd.teachers import base

MODES = ["base", "full", "adapter", "merged"]


def student_and_teacher(mode: str):
    model = tiny_run.llama(tie_word_embeddings=True)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    if mode in ("adapter", "merged"):
        model = get_peft_model(model, tiny_run.lora(modules_to_save=["norm"]))
    if mode == "base":
        return model, teachers.make_teacher(model, teacher="base", ema="none", decay=0.0)
    teacher = teachers.make_teacher(model, teacher="self", ema=mode, decay=0.75)
    tiny_run.perturb(model)
    teacher.update(model)
    return model, teacher


def averages(teacher) -> dict:
    return teacher.tensors() if isinstance(teacher, teachers.EMATeacher) else {}


@pytest.mark.parametrize("mode", MODES)
def test_the_teacher_is_where_the_student_is(mode):
    model, teacher = student_and_teacher(mode)
    model.to("meta")
    with teacher.scoring(model) as scorer:
        tensors = [*scorer.parameters(), *scorer.buffers(), *averages(teacher).values()]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
        ids = torch.zeros(1, 3, dtype=torch.long, device="meta")
        assert scorer(input_ids=ids).logits.device.type == "meta"


@pytest.mark.parametrize("mode", MODES[1:])
def test_an_update_follows_too(mode, monkeypatch):
    model, teacher = student_and_teacher(mode)
    seen = []
    monkeypatch.setattr(
        base, "ema_update_", lambda averages, weights, decay: seen.extend([*averages, *(w for w in weights)])
    )
    model.to("meta")
    teacher.update(model)
    assert seen
    assert {tensor.device.type for tensor in seen} == {"meta"}


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_cast_student_leaves_the_float32_average_as_it_was(mode):
    model, teacher = student_and_teacher(mode)
    before = {name: tensor.clone() for name, tensor in teacher.tensors().items()}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.to(torch.bfloat16)
    ids = torch.tensor([[5, 6, 7]])
    with teacher.scoring(model) as scorer, torch.no_grad():
        assert scorer(input_ids=ids).logits.dtype == torch.bfloat16
        assert (scorer.get_output_embeddings().weight is scorer.get_input_embeddings().weight) == tied
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.tensors().items())
    assert {tensor.dtype for tensor in teacher.tensors().values()} == {torch.float32}
    tiny_run.perturb(model, seed=2)
    teacher.update(model)
    for name, tensor in teacher.tensors().items():
        if name.endswith(".delta"):
            continue
        student = dict(model.named_parameters())[name].float()
        assert torch.allclose(tensor, 0.75 * before[name] + 0.25 * student, rtol=1e-5, atol=1e-6), name
    model.float()
    with teacher.scoring(model) as scorer:
        weights = dict(scorer.named_parameters())
        for name, tensor in teacher.tensors().items():
            assert name.endswith(".delta") or torch.equal(weights[name], tensor), name


@pytest.mark.parametrize("mode", ["full", "adapter"])
def test_evaluation_in_16_bits_before_training(tmp_path, mode):
    """`bf16_full_eval` leaves the model where it is until evaluation, which then casts it."""
    run = tiny_run.FixedRollouts(
        model=tiny_run.llama(),
        args=tiny_run.config(tmp_path, preset="ema", ema=mode, bf16_full_eval=True),
        train_dataset=tiny_run.dataset(),
        eval_dataset=tiny_run.dataset(),
        processing_class=tiny_run.tokenizer(),
        peft_config=None if mode == "full" else tiny_run.lora(),
    )
    loss = run.evaluate()["eval_loss"]
    wide = tiny_run.FixedRollouts(
        model=tiny_run.llama(),
        args=tiny_run.config(tmp_path, preset="ema", ema=mode),
        train_dataset=tiny_run.dataset(),
        eval_dataset=tiny_run.dataset(),
        processing_class=tiny_run.tokenizer(),
        peft_config=None if mode == "full" else tiny_run.lora(),
    )
    assert loss == pytest.approx(wide.evaluate()["eval_loss"], rel=0.05)
