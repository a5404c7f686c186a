"""`LMHead.from_model` of transformers' own classes: head and backbone give what the model itself gives."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import nn
from transformers import AyaVisionForConditionalGeneration, Cohere2VisionForConditionalGeneration

from tests.heads import tiny_models
from unisd_kernels import LMHead
from unisd_kernels.heads.causal_model import backbone


def difference(model, head):
    """Largest difference of a log-probability, nats, on other tokens than the check's own and with a formula of its
    own."""
    ids = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits.double()
        hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state.double()
        logits = hidden @ head.active_weight.double().T
        if head.active_bias is not None:
            logits = logits + head.active_bias.double()
        logits = logits * head.logit_scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
    assert expected.shape == logits.shape
    return float((expected.log_softmax(-1) - logits.log_softmax(-1)).abs().max())


def loud(model, factor=6.0):
    """Logits so large that a scale and a cap show in them."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(factor)
    return model


READ = [
    ("llama", {}, 1.0, None),
    ("llama4_text", {}, 1.0, None),
    ("granite", {"logits_scaling": 8.0}, 0.125, None),
    ("granitemoe", {"logits_scaling": 8.0}, 0.125, None),
    ("granitemoeshared", {"logits_scaling": 8.0}, 0.125, None),
    ("hyperclovax", {"logits_scaling": 8.0}, 8.0, None),
    ("minicpm3", {"dim_model_base": 16}, 0.5, None),
    ("falcon_h1", {"lm_head_multiplier": 0.25}, 0.25, None),
    ("cohere", {"logit_scale": 0.25}, 0.25, None),
    ("cohere2", {"logit_scale": 0.25}, 0.25, None),
    ("gemma2", {"final_logit_softcapping": 12.0}, 1.0, 12.0),
    ("gemma3_text", {"final_logit_softcapping": 12.0}, 1.0, 12.0),
    ("recurrent_gemma", {"logits_soft_cap": 12.0}, 1.0, 12.0),
    ("inkling_text", {"logits_mup_width_multiplier": 8.0}, 0.125, None),
    ("xlstm", {"output_logit_soft_cap": 12.0}, 1.0, 12.0),
    # The forward ignores the field.
    ("mpt", {"logit_scale": None}, 1.0, None),
    ("mpt", {"logit_scale": 0.5}, 1.0, None),
    ("mpt", {"logit_scale": "inv_sqrt_d_model"}, 1.0, None),
    ("gpt2", {}, 1.0, None),
    ("phi", {}, 1.0, None),  # with a bias
]


@pytest.mark.parametrize(("model_type", "fields", "scale", "softcap"), READ)
def test_the_head_is_what_the_forward_does(model_type, fields, scale, softcap):
    model = loud(tiny_models.model(model_type, **fields))
    head = LMHead.from_model(model)
    assert head.logit_scale == pytest.approx(scale, rel=1e-6)
    assert head.softcap == softcap
    assert head.weight is model.get_output_embeddings().weight
    assert difference(model, head) < 1e-3
    if (scale, softcap) != (1.0, None):  # else the test could not tell
        assert difference(model, LMHead(head.weight, head.bias)) > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("index", [2, 6, 8, 10, 12])
def test_rounding_is_not_taken_for_a_mistake(index, dtype):
    model_type, fields, scale, softcap = READ[index]
    head = LMHead.from_model(tiny_models.model(model_type, dtype=dtype, **fields))
    assert head.logit_scale == pytest.approx(scale, rel=1e-6)
    assert head.softcap == softcap
    assert head.weight.dtype == dtype


def test_a_wrong_scale_is_found_in_sixteen_bits():
    model = tiny_models.model("llama", dtype=torch.bfloat16)
    model.lm_head.register_forward_hook(lambda module, args, output: output * 0.95)
    with pytest.raises(ValueError, match=r"A logit_scale of 0\.95"):
        LMHead.from_model(model)


def _image_model(model_type, model_class):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 96}
    text = {**small, "num_attention_heads": 4, "num_key_value_heads": 4, "logit_scale": 0.25, "head_dim": 8}
    vision = {**small, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    base = tiny_models.config_class(model_type)().to_dict()
    parts = {
        "text_config": {**text, "model_type": base["text_config"]["model_type"], "final_logit_softcapping": 2.0},
        "vision_config": {**vision, "model_type": base["vision_config"]["model_type"]},
    }
    torch.manual_seed(0)
    return model_class(tiny_models.config_class(model_type)(**parts, image_token_id=95)).eval()


@pytest.mark.parametrize(
    ("model_type", "model_class"),
    [
        ("cohere2_vision", Cohere2VisionForConditionalGeneration),
        ("aya_vision", AyaVisionForConditionalGeneration),
        ("gemma3", None),
    ],
)
def test_a_scale_and_a_cap_that_an_image_models_forward_leaves_out(model_type, model_class):
    from transformers import Gemma3ForConditionalGeneration

    model = loud(_image_model(model_type, model_class or Gemma3ForConditionalGeneration), 100.0)
    assert model.config.get_text_config().final_logit_softcapping == 2.0
    head = LMHead.from_model(model)
    assert (head.logit_scale, head.softcap) == (1.0, None)
    assert difference(model, head) < 1e-3
    assert difference(model, LMHead(head.weight, head.bias, 1.0, 2.0)) > 0.05


@pytest.mark.parametrize("model_type", ["modernbert-decoder", "bert", "roberta", "electra"])
def test_layers_between_backbone_and_head_are_refused(model_type):
    model = tiny_models.model(model_type)
    with pytest.raises(ValueError, match=r"changes the hidden states between its backbone and its head") as raised:
        LMHead.from_model(model)
    stated = float(str(raised.value).split("by up to ")[1].split(" nats")[0])
    assert 0.1 < stated < 1000
    assert len(str(raised.value).splitlines()) == 1


class Normalized(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, nn.functional.normalize(self.weight, dim=1))


def test_a_head_with_a_forward_of_its_own_is_refused():
    model = tiny_models.model("llama")
    head = Normalized(32, tiny_models.VOCAB_SIZE, bias=False)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
    model.lm_head = head
    with pytest.raises(ValueError, match=r"differs from the model's own log-probabilities by up to .* No logit_scale"):
        LMHead.from_model(model)
    assert LMHead.from_model(model, verify=False).weight is head.weight


def test_a_scaling_hook_is_explained_and_can_be_declared():
    model = tiny_models.model("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output * 0.125)
    with pytest.raises(ValueError, match=r"A logit_scale of 0\.125 explains it: LMHead\(weight, bias, logit_sc"):
        LMHead.from_model(model)
    model.config.logit_scale = 0.125
    head = LMHead.from_model(model)
    assert head.logit_scale == 0.125
    assert difference(model, head) < 1e-3


def test_a_cap_that_no_field_names_is_explained():
    model = tiny_models.model("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: 20 * torch.tanh(0.5 * output / 20))
    with pytest.raises(ValueError, match=r"A logit_scale of 0\.5 and a softcap of 20 explains it"):
        LMHead.from_model(model)


def test_a_head_of_several_modules_is_refused():
    model = tiny_models.model("llama")
    model.lm_head = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, tiny_models.VOCAB_SIZE))
    with pytest.raises(ValueError, match=r"is a Sequential without a `weight`, not one linear layer"):
        LMHead.from_model(model)


def test_padded_columns_that_the_forward_cuts_off():
    model = tiny_models.model("inkling_text", unpadded_vocab_size=90)
    head = LMHead.from_model(model)
    assert head.vocab_size == 90
    assert difference(model, head) < 1e-3
    assert LMHead.from_model(model, vocab_size=80).num_columns == 80
    with pytest.raises(ValueError, match="vocab_size=95 cannot be checked"):
        LMHead.from_model(model, vocab_size=95)


def test_padded_columns_of_any_value_are_not_compared():
    model = tiny_models.model("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output.index_fill(-1, torch.arange(90, 96), -1e9))
    with pytest.raises(ValueError, match="differs"):
        LMHead.from_model(model)
    assert LMHead.from_model(model, vocab_size=90).num_columns == 90


def test_nothing_of_the_model_is_changed():
    model = tiny_models.model("llama", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    while_run = []
    model.model.layers[1].register_forward_pre_hook(lambda module, args: while_run.append(module.training))
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(7)
    random.seed(7)
    state, python_state = torch.get_rng_state(), random.getstate()
    LMHead.from_model(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state
    assert while_run == [False] * 3  # without dropout
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_and_mode_are_put_back_after_a_failure():
    model = tiny_models.model("llama").train()

    def broken(*args, **kwargs):
        raise RuntimeError("pixel_values are needed\nand more")

    handle = model.model.layers[0].register_forward_pre_hook(broken)
    with pytest.raises(ValueError, match=r"cannot be checked, because its forward .* RuntimeError: pixel_values are"):
        LMHead.from_model(model)
    handle.remove()
    assert all(module.training for module in model.modules())
    assert not model.model._forward_hooks
    assert not model.lm_head._forward_pre_hooks


def test_autocast_inside_the_models_forward():
    """As Accelerate prepares a model for mixed precision: its forward runs in 16 bits, its parts do not."""
    model = tiny_models.model("granite", logits_scaling=8.0)
    forward = model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(forward)
    assert LMHead.from_model(model).logit_scale == 0.125


def test_a_backbone_that_gets_something_else_than_the_tokens():
    model = tiny_models.model("llama")
    forward = model.forward
    model.forward = lambda input_ids, **options: forward(inputs_embeds=3 * model.model.embed_tokens(input_ids) + 1)
    with pytest.raises(ValueError, match="does not run its backbone"):
        LMHead.from_model(model)


def test_a_head_of_zeros_and_one_on_the_meta_device():
    model = tiny_models.model("llama")
    nn.init.zeros_(model.lm_head.weight)
    with pytest.raises(ValueError, match="cannot be checked: its weight is zero"):
        LMHead.from_model(model)
    with pytest.raises(ValueError, match="meta device"):
        LMHead.from_model(model.to("meta"))


def test_a_sharded_model_is_not_run():
    model = tiny_models.model("llama")
    model.model.norm.weight.ds_id = 1
    with pytest.raises(ValueError, match=r"sharded model .* verify=False"):
        LMHead.from_model(model)
    assert LMHead.from_model(model, verify=False).logit_scale == 1.0


def test_a_peft_model_and_a_compiled_one():
    from peft import LoraConfig, get_peft_model

    model = tiny_models.model("granite", logits_scaling=8.0)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    head = LMHead.from_model(adapted)
    assert head.logit_scale == 0.125
    assert head.weight is model.lm_head.weight

    def backend(graph, inputs):
        raise AssertionError("nothing is compiled for eight tokens")

    assert LMHead.from_model(torch.compile(model, backend=backend)).logit_scale == 0.125


def test_the_trainer_and_evaluation_verify_once_a_model():
    import copy

    from unisd.modules import model_head

    model = tiny_models.model("mpt", logit_scale=0.5)
    calls = []
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    first = model_head(model)
    count = len(calls)
    assert count > 0
    assert first.logit_scale == 1.0
    duplicate = copy.deepcopy(model)
    head = model_head(duplicate)
    assert head.weight is duplicate.lm_head.weight
    assert model_head(model).weight is model.lm_head.weight
    assert head.logit_scale == 1.0  # what was verified, not what the configuration's name says
    assert len(calls) == count
    # Another head is verified anew.
    model.lm_head = Normalized(32, tiny_models.VOCAB_SIZE, bias=False)
    with pytest.raises(ValueError, match="differs"):
        model_head(model)


def test_without_running_the_names_are_believed():
    assert LMHead.from_model(tiny_models.model("granite", logits_scaling=8.0), verify=False).logit_scale == 0.125
    assert LMHead.from_model(tiny_models.model("mpt", logit_scale=0.5), verify=False).logit_scale == 1.0
    assert LMHead.from_model(tiny_models.model("xlstm"), verify=False).softcap == 30.0
    assert math.isclose(LMHead.from_model(tiny_models.model("inkling_text"), verify=False).logit_scale, 1 / 24)
