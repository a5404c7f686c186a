"""`LMHead`: what its fields may be; what `from_model` reads from a configuration, and what it refuses without running.

What it does with real models is in tests/heads.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
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
    head = LMHead.from_model(Model(layer), verify=False)
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
        ({"logits_mup_width_multiplier": 8.0}, 0.125, None),
        ({"logits_soft_cap": 30.0, "attn_logit_softcapping": 50.0}, 1.0, 30.0),
        ({"output_logit_soft_cap": 30.0, "gate_soft_cap": 15.0}, 1.0, 30.0),
        ({"logit_scale": True, "final_logit_softcapping": math.nan}, 1.0, None),
    ],
)
def test_logit_post_processing(config, scale, softcap):
    head = LMHead.from_model(Model(linear(), **config), verify=False)
    assert head.logit_scale == scale
    assert head.softcap == softcap


def test_text_config_of_a_multimodal_model():
    model = Model(linear())
    model.config.get_text_config = lambda: SimpleNamespace(final_logit_softcapping=15.0)
    assert LMHead.from_model(model, verify=False).softcap == 15.0


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


WEIGHT = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"logit_scale": True}, TypeError, "logit_scale must be a number, got bool True"),
        ({"logit_scale": "0.5"}, TypeError, "logit_scale must be a number, got str '0.5'"),
        ({"logit_scale": None}, TypeError, "logit_scale must be a number, got NoneType"),
        ({"logit_scale": torch.tensor(0.5)}, TypeError, r"got Tensor ; take \.item\(\)"),
        ({"logit_scale": np.bool_(True)}, TypeError, "logit_scale must be a number, got bool"),
        ({"logit_scale": 1j}, TypeError, "logit_scale must be a number, got complex"),
        ({"logit_scale": math.nan}, ValueError, "logit_scale must be finite and not zero, got nan"),
        ({"logit_scale": -math.inf}, ValueError, "logit_scale must be finite and not zero, got -inf"),
        ({"logit_scale": np.float32(0.0)}, ValueError, "logit_scale must be finite and not zero"),
        ({"softcap": True}, TypeError, "softcap must be a number, got bool True"),
        ({"softcap": "30"}, TypeError, "softcap must be a number, got str"),
        ({"softcap": math.nan}, ValueError, "softcap must be a finite number > 0 or None, got nan"),
        ({"softcap": np.float64(math.inf)}, ValueError, "softcap must be a finite number > 0"),
        ({"softcap": 0}, ValueError, "softcap must be a finite number > 0 or None, got 0"),
        ({"softcap": -30.0}, ValueError, "softcap must be a finite number > 0"),
        ({"vocab_size": 2.5}, TypeError, r"vocab_size must be an integer or None, got float 2\.5"),
        ({"vocab_size": 2.0}, TypeError, "vocab_size must be an integer or None, got float"),
        ({"vocab_size": True}, TypeError, "vocab_size must be an integer or None, got bool True"),
        ({"vocab_size": math.nan}, TypeError, "vocab_size must be an integer or None, got float nan"),
        ({"vocab_size": "2"}, TypeError, "vocab_size must be an integer or None, got str"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be between 1 and the 3 rows"),
        ({"vocab_size": np.int64(4)}, ValueError, "vocab_size must be between 1 and the 3 rows of the weight, got 4"),
        ({"bias": [0.0, 0.0, 0.0]}, TypeError, "bias must be a torch.Tensor"),
        ({"bias": torch.ones(3, dtype=torch.float16)}, TypeError, "convert one of them"),
        ({"bias": torch.ones(2)}, ValueError, r"bias must have shape \[3\]"),
        ({"weight": WEIGHT.to(torch.float8_e4m3fn)}, TypeError, "float32, float64, bfloat16 or float16.*float8_e4m3fn"),
        ({"weight": WEIGHT.to(torch.float8_e5m2)}, TypeError, "dequantize"),
        ({"weight": WEIGHT.to(torch.int8)}, TypeError, "dequantize"),
        ({"weight": WEIGHT.to(torch.complex64)}, TypeError, "got torch.complex64"),
        ({"weight": np.ones((3, 2))}, TypeError, "weight must be a torch.Tensor"),
        ({"weight": torch.ones(3)}, ValueError, r"shape \[V, H\]"),
    ],
)
def test_fields_that_are_no_head(fields, error, message):
    with pytest.raises(error, match=message) as raised:
        LMHead(**{"weight": WEIGHT, **fields})
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, float])
def test_numpy_numbers_become_pythons(kind):
    head = LMHead(WEIGHT, None, kind(0.5), kind(30.0), np.int32(2))
    assert (head.logit_scale, head.softcap, head.vocab_size) == (0.5, 30.0, 2)
    assert [type(value) for value in (head.logit_scale, head.softcap, head.vocab_size)] == [float, float, int]
    assert type(LMHead(WEIGHT, None, 2).logit_scale) is float


def test_a_model_that_cannot_be_run_is_refused():
    with pytest.raises(ValueError, match="no backbone apart from its head"):
        LMHead.from_model(Model(linear()))
