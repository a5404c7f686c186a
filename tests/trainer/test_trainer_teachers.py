"""The teacher's weights: averages in closed form, what is lent is given back."""

import pytest
import torch
from peft import get_peft_model
from transformers import TrainerCallback

from tests.trainer import tiny_run
from unisd.teachers import (
    AdapterEMATeacher,
    BaseTeacher,
    FullEMATeacher,
    MergedEMATeacher,
    SelfTeacher,
    make_teacher,
)
from unisd_kernels import LMHead

DECAY = 0.7
IDS = torch.tensor([[7, 8, 9, 10, 11]])


class Snapshots(TrainerCallback):
    """The student's trained weights before training and after every optimizer step."""

    def __init__(self, model):
        self.weights = [_copies(model)]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(_copies(model))


def _copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train(tmp_path, model, **overrides):
    """Five optimizer steps of two micro-batches, the average moving after steps 2 and 4."""
    overrides = {"preset": "plain", "sync_steps": 2, "max_steps": 5, "learning_rate": 0.2, **overrides}
    if overrides["ema"] != "none":
        overrides["ema_decay"] = DECAY
    run = tiny_run.trainer(tmp_path, model, per_device_train_batch_size=2, gradient_accumulation_steps=2, **overrides)
    snapshots = Snapshots(run.model)
    run.add_callback(snapshots)
    run.train()
    return run, snapshots.weights


def closed_form(values: list[torch.Tensor]) -> torch.Tensor:
    """The average of float64 values at steps 0, 2 and 4."""
    average = values[0]
    for step in (2, 4):
        average = DECAY * average + (1 - DECAY) * values[step]
    return average


def lora_model(**overrides):
    model = get_peft_model(tiny_run.llama(), tiny_run.lora(**overrides))
    tiny_run.perturb(model)
    return model


def hidden(model) -> torch.Tensor:
    return model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]


def test_full_average_equals_the_closed_form(tmp_path):
    run, weights = train(tmp_path, tiny_run.llama(), ema="full")
    assert isinstance(run.teacher, FullEMATeacher)
    assert run.teacher.updates == 2
    averages = run.teacher.tensors()
    assert averages.keys() == weights[0].keys()
    for name, average in averages.items():
        expected = closed_form([step[name].double() for step in weights])
        assert torch.allclose(average.double(), expected, rtol=0, atol=1e-6), name
    # The module that scores has these weights, and the student is another one.
    student = _copies(run.model)
    with run.teacher.scoring(run.model) as scorer:
        scoring = dict(scorer.named_parameters())
        assert all(torch.equal(scoring[name], average) for name, average in averages.items())
    assert any(not torch.equal(student[name], average) for name, average in averages.items())


def test_full_average_of_a_16_bit_student_is_float32(tmp_path):
    """Steps far below half an ulp of bfloat16: an average kept in 16 bits would not move at all."""
    model = tiny_run.llama().bfloat16()
    teacher = FullEMATeacher(model, decay=0.98)
    name = "model.layers.0.self_attn.q_proj.weight"
    start = dict(model.named_parameters())[name].detach().float().clone()
    with torch.no_grad():
        dict(model.named_parameters())[name].mul_(1.0625)
    for _ in range(50):
        teacher.update(model)
    student = dict(model.named_parameters())[name].float()
    average = teacher.tensors()[name]
    assert average.dtype == torch.float32
    expected = student + 0.98**50 * (start - student)
    assert torch.allclose(average, expected, rtol=1e-5, atol=1e-7)
    with teacher.scoring(model) as scorer:
        assert torch.equal(dict(scorer.named_parameters())[name], average.bfloat16())


def test_frozen_weights_are_shared_with_the_student():
    model = tiny_run.llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    teacher = FullEMATeacher(model, DECAY)
    with teacher.scoring(model) as scorer:
        assert scorer.model.embed_tokens.weight is model.model.embed_tokens.weight
        assert scorer.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()
    assert "model.embed_tokens.weight" not in teacher.tensors()
    assert model.lm_head.weight.requires_grad


def test_adapter_average_equals_the_closed_form(tmp_path):
    run, weights = train(tmp_path, lora_model(), ema="auto", preset="ema")
    assert isinstance(run.teacher, AdapterEMATeacher)
    averages = run.teacher.tensors()
    assert averages.keys() == weights[0].keys()
    assert all("lora_" in name for name in averages)
    for name, average in averages.items():
        expected = closed_form([step[name].double() for step in weights])
        assert torch.allclose(average.double(), expected, rtol=0, atol=1e-6), name


def _products(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """scaling B A of every layer, float64."""
    return {
        name.removesuffix(".lora_B.default.weight"): 2.0  # lora_alpha / r
        * b.double()
        @ weights[name.replace("lora_B", "lora_A")].double()
        for name, b in weights.items()
        if "lora_B" in name
    }


def test_merged_average_is_the_average_of_products(tmp_path):
    run, weights = train(tmp_path, lora_model(), ema="merged")
    assert isinstance(run.teacher, MergedEMATeacher)
    averages = run.teacher.tensors()
    products = [_products(step) for step in weights]
    assert averages.keys() == {f"{name}.delta" for name in products[0]}
    for name in products[0]:
        expected = closed_form([step[name] for step in products])
        assert torch.allclose(averages[f"{name}.delta"].double(), expected, rtol=0, atol=1e-6), name


def test_average_of_factors_is_not_the_average_of_products(tmp_path):
    run, weights = train(tmp_path, lora_model(), ema="adapter")
    products = [_products(step) for step in weights]
    of_factors = _products(run.teacher.tensors())
    error = max((of_factors[name] - closed_form([step[name] for step in products])).abs().max() for name in of_factors)
    assert error > 1e-3


def test_merged_teacher_scores_like_a_model_with_merged_weights():
    model = lora_model()
    teacher = MergedEMATeacher(model, DECAY)
    tiny_run.perturb(model, seed=2)
    teacher.update(model)
    dense = tiny_run.llama()
    weights = dict(dense.named_parameters())
    with torch.no_grad():
        for name, delta in teacher.tensors().items():
            name = name.removeprefix("base_model.model.").removesuffix(".delta")
            weights[f"{name}.weight"].add_(delta)
        expected = hidden(dense)
    with teacher.scoring(model) as scorer:
        actual = hidden(scorer)
    assert torch.allclose(actual, expected, atol=1e-5)
    assert not torch.allclose(actual, hidden(model), atol=1e-3)


@pytest.mark.parametrize("mode", ["adapter", "merged"])
def test_average_starts_at_the_student(mode):
    model = lora_model().eval()
    teacher = make_teacher(model, teacher="self", ema=mode, decay=DECAY)
    with teacher.scoring(model) as scorer:
        assert torch.allclose(hidden(scorer), hidden(model), atol=1e-5)
    teacher.update(model)
    with teacher.scoring(model) as scorer:
        assert torch.allclose(hidden(scorer), hidden(model), atol=1e-5)


@pytest.mark.parametrize("mode", ["self", "base", "adapter", "merged", "full", "base_full"])
@pytest.mark.parametrize("fails", [False, True])
def test_scoring_gives_back_the_student_bit_for_bit(mode, fails):
    model = tiny_run.llama(attention_dropout=0.3) if mode in ("full", "base_full") else lora_model(lora_dropout=0.3)
    kind = {
        "teacher": "base" if "base" in mode else "self",
        "ema": mode if mode in ("adapter", "merged", "full") else "none",
    }
    teacher = make_teacher(model, **kind, decay=DECAY)
    tiny_run.perturb(model, seed=3)
    model.train()
    model.get_submodule("lm_head" if "full" in mode else "base_model.model.lm_head").eval()  # one module apart
    weights = {name: (p.detach().clone(), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    before = hidden(model.eval()).detach()
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    for name, module in model.named_modules():
        module.training = modes[name]

    def score():
        with teacher.scoring(model) as scorer:
            assert not torch.is_grad_enabled()
            assert not any(module.training for module in scorer.modules())
            scored = hidden(scorer)
            if fails:
                raise RuntimeError("in the middle")
            return scored

    if fails:
        with pytest.raises(RuntimeError, match="in the middle"):
            score()
    else:
        assert torch.allclose(score(), before) == (mode == "self")
    assert torch.is_grad_enabled()
    for name, parameter in model.named_parameters():
        value, pointer, requires_grad = weights[name]
        assert torch.equal(parameter, value), name
        assert parameter.data_ptr() == pointer, name
        assert parameter.requires_grad == requires_grad, name
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    assert torch.equal(hidden(model.eval()), before)


@pytest.mark.parametrize("peft", [False, True])
def test_base_teacher_keeps_the_weights_from_before_training(tmp_path, peft):
    model = lora_model() if peft else tiny_run.llama()
    with torch.no_grad():
        expected = hidden(tiny_run.llama())
    run, weights = train(tmp_path, model, teacher="base", ema="none")
    assert isinstance(run.teacher, BaseTeacher)
    assert any(not torch.equal(weights[0][name], weights[-1][name]) for name in weights[0])
    with run.teacher.scoring(run.model) as scorer:
        assert torch.allclose(hidden(scorer), expected, atol=1e-5)
        head = run.teacher.head(run.model)
    if peft:
        assert head is None  # frozen, so the student's is the same
    else:
        assert torch.equal(head.weight, weights[0]["lm_head.weight"])


@pytest.mark.parametrize(("kind", "ema"), [("self", "none"), ("base", "none"), ("self", "adapter"), ("self", "merged")])
def test_trained_head_beside_an_adapter(kind, ema):
    """`modules_to_save=["lm_head"]`: the teacher scores with its own head, also after its weights are given back."""
    model = get_peft_model(tiny_run.llama(), tiny_run.lora(modules_to_save=["lm_head"]))
    start = tiny_run.llama().lm_head.weight.detach()
    teacher = make_teacher(model, teacher=kind, ema=ema, decay=0.5)
    tiny_run.perturb(model, seed=4)
    trained = LMHead.from_model(model).weight.detach().clone()
    if ema != "none":
        teacher.update(model)
    with teacher.scoring(model):
        head = teacher.head(model)
    assert torch.equal(LMHead.from_model(model).weight, trained)
    if kind == "self" and ema == "none":
        assert head is None  # the student's own, always
    else:
        expected = start if kind == "base" else (start + trained) / 2
        assert torch.allclose(head.weight, expected, atol=1e-6)
        assert not head.weight.requires_grad


def test_self_teacher_follows_the_student_and_has_no_state(tmp_path):
    run, _ = train(tmp_path, tiny_run.llama(), ema="none")
    assert isinstance(run.teacher, SelfTeacher)
    with run.teacher.scoring(run.model) as scorer:
        assert scorer is run.model
        assert run.teacher.head(run.model) is None


def test_modes_that_do_not_fit_the_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="use ema='adapter' or ema='merged'"):
        tiny_run.trainer(tmp_path, lora_model(), preset="ema", ema="full")
    for mode in ("adapter", "merged"):
        with pytest.raises(ValueError, match=f"ema='{mode}' averages a PEFT adapter.*use ema='full'"):
            tiny_run.trainer(tmp_path, preset="ema", ema=mode)
    with pytest.raises(ValueError, match=r"DoRA.*use ema='adapter'"):
        make_teacher(lora_model(use_dora=True), teacher="self", ema="merged", decay=DECAY)
    with pytest.raises(ValueError, match=r"embedding.*use ema='adapter'"):
        make_teacher(lora_model(target_modules=["embed_tokens"]), teacher="self", ema="merged", decay=DECAY)
    with pytest.raises(ValueError, match=r"LoRA bias.*use ema='adapter'"):
        make_teacher(lora_model(lora_bias=True), teacher="self", ema="merged", decay=DECAY)


def test_load_state_dict_refuses_another_teacher():
    model = lora_model()
    adapter, merged = AdapterEMATeacher(model, DECAY), MergedEMATeacher(model, DECAY)
    with pytest.raises(ValueError, match="ema='adapter' but this run has ema='merged'"):
        merged.load_state_dict(adapter.state_dict())
    other = AdapterEMATeacher(lora_model(target_modules=["q_proj"]), DECAY)
    with pytest.raises(ValueError, match="another model or adapter"):
        adapter.load_state_dict(other.state_dict())
    narrow = AdapterEMATeacher(lora_model(r=2), DECAY)
    with pytest.raises(ValueError, match=r"expected torch.float32"):
        adapter.load_state_dict(narrow.state_dict())
