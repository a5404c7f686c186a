"""`LMHead.from_model`: what it reads from a model, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from unisd_kernels import LMHead


class Model:
    """The two things `from_model` needs of a Hugging Face model."""

    def __init__(self, head, **config):
        self.head = head
        self.config = SimpleNamespace(**config)

    def get_output_embeddings(self):
        return self.head


def linear(bias=False):
    return torch.nn.Linear(4, 9, bias=bias)


def test_weight_and_bias_are_the_models_own():
    layer = linear(bias=True)
    head = LMHead.from_model(Model(layer))
    assert head.weight is layer.weight
    assert head.bias is layer.bias
    assert (head.logit_scale, head.softcap, head.num_columns, head.hidden_size) == (1.0, None, 9, 4)


@pytest.mark.parametrize(
    ("config", "scale", "softcap"),
    [
        ({"final_logit_softcapping": 30.0}, 1.0, 30.0),
        ({"logit_scale": 0.0625}, 0.0625, None),
        ({"logit_scale": None}, 1.0, None),
        ({"lm_head_multiplier": 0.5}, 0.5, None),
        ({"output_multiplier": 2.0}, 2.0, None),
        ({"logits_scaling": 8.0, "model_type": "granite"}, 0.125, None),
        ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, 8.0, None),
    ],
)
def test_logit_post_processing(config, scale, softcap):
    head = LMHead.from_model(Model(linear(), **config))
    assert head.logit_scale == scale
    assert head.softcap == softcap


def test_text_config_of_a_multimodal_model():
    model = Model(linear())
    model.config.get_text_config = lambda: SimpleNamespace(final_logit_softcapping=15.0)
    assert LMHead.from_model(model).softcap == 15.0


def test_an_adapter_on_the_head_is_refused():
    layer = linear()
    layer.base_layer = linear()
    with pytest.raises(ValueError, match="target_modules"):
        LMHead.from_model(Model(layer))


def test_no_head_sharded_head_and_meta_head_are_refused():
    with pytest.raises(ValueError, match="output embeddings, got Model"):
        LMHead.from_model(Model(None))
    sharded = linear()
    sharded.weight = torch.nn.Parameter(torch.empty(0))
    sharded.weight.ds_id = 3
    with pytest.raises(ValueError, match="ZeRO-3"):
        LMHead.from_model(Model(sharded))
    with pytest.raises(ValueError, match="meta device"):
        LMHead.from_model(Model(torch.nn.Linear(4, 9, device="meta")))


def test_detach_freezes():
    head = LMHead(torch.ones(3, 2, requires_grad=True), torch.ones(3, requires_grad=True), 2.0, 3.0, 2).detach()
    assert not head.weight.requires_grad
    assert not head.bias.requires_grad
    assert (head.logit_scale, head.softcap, head.vocab_size) == (2.0, 3.0, 2)
