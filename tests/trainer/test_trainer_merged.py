"""Rollouts from merged weights: the adapted model's logits meanwhile, and every bit of its weights afterwards."""

import pytest
import torch
from peft import get_peft_model
from transformers import TrainerCallback

from tests.trainer import tiny_run
from unisd.generation.merged import merged_adapters, merges_rollouts
from unisd.trainer import UniSDTrainer

IDS = torch.tensor([[5, 6, 7, 8]])


def adapted(**settings):
    model = get_peft_model(tiny_run.llama(), tiny_run.lora(**settings)).eval()
    tiny_run.perturb(model, 0.2)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_the_same_logits_and_the_weights_come_back(settings):
    model = adapted(**settings)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits(model)
    products = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda m, i, o: products.append(type(m).__name__))
    try:
        with merged_adapters(model):
            torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        merged = products.count("Linear")
        products.clear()
        with merged_adapters(model, active=False):
            assert torch.equal(logits(model), expected)
    finally:
        hook.remove()
    adapters = 2 * 3 * 2  # layers, targets, A and B
    assert products.count("Linear") >= merged + adapters
    with pytest.raises(KeyError), merged_adapters(model):
        raise KeyError
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), expected)


def test_a_run_samples_from_merged_weights_on_a_cpu_unless_told_otherwise(tmp_path):
    class Watching(UniSDTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            layer = self.model.base_model.model.model.layers[0].self_attn.q_proj
            hook = layer.register_forward_hook(lambda *_: seen.append(layer.merged))
            try:
                return super()._generate_single_turn(*args, **kwargs)
            finally:
                hook.remove()
                assert not layer.merged

    class Seen(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights.append([p.clone() for p in model.parameters() if not p.requires_grad])

    for asked in (None, True, False):
        seen, weights = [], []
        run = tiny_run.trainer(
            tmp_path, cls=Watching, peft_config=tiny_run.lora(), preset="plain", max_steps=2, merged_rollouts=asked
        )
        before = [p.clone() for p in run.model.parameters() if not p.requires_grad]
        run.add_callback(Seen())
        run.train()
        assert set(seen) == {asked is not False}
        assert all(torch.equal(a, b) for step in weights for a, b in zip(before, step, strict=True))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (None, "no PEFT adapter"),
        (
            {"target_modules": ["embed_tokens", "q_proj"]},
            "embed_tokens is not LoRA on a linear layer but Embedding on",
        ),
        ({"lora_bias": True}, "has a bias in its adapter and none in its base"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name_or_left_alone(tmp_path, settings, reason):
    model = tiny_run.llama() if settings is None else get_peft_model(tiny_run.llama(), tiny_run.lora(**settings))
    with pytest.raises(ValueError, match=f"merged_rollouts=True cannot be: .*{reason}"):
        tiny_run.trainer(tmp_path, model, preset="plain", merged_rollouts=True)
    assert not merges_rollouts(tiny_run.config(tmp_path), model, is_sharded=False)


def test_sharded_weights_vllm_and_a_shared_weight_are_refused(tmp_path):
    config = tiny_run.config(tmp_path, merged_rollouts=True)
    with pytest.raises(ValueError, match="shards the weights"):
        merges_rollouts(config, adapted(), is_sharded=True)
    config.use_vllm = True
    with pytest.raises(ValueError, match="vLLM samples"):
        merges_rollouts(config, adapted(), is_sharded=False)
    config.use_vllm = False
    model = adapted()
    layers = model.base_model.model.model.layers
    layers[1].self_attn.q_proj.base_layer.weight = layers[0].self_attn.q_proj.base_layer.weight
    with pytest.raises(ValueError, match=r"q_proj shares its weight with another module"):
        merges_rollouts(config, model, is_sharded=False)
