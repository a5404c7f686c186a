"""Drift from the base model: zero at the start, the dense divergence later."""

import pytest
import torch
from peft import get_peft_model
from transformers import TrainerCallback

from tests.trainer import tiny_run
from unisd.drift import DriftProbe


def probe(**overrides) -> DriftProbe:
    from unisd.modules import backbone

    tokenizer = tiny_run.tokenizer()

    def prompt_ids(prompts):
        if isinstance(prompts[0], str):
            return tokenizer(text=prompts)["input_ids"]
        return tokenizer.apply_chat_template(prompts, add_generation_prompt=True)["input_ids"]

    def hidden_states(model, ids, mask, count):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = backbone(model)(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        return out.last_hidden_state[:, -(count + 1) : -1]

    settings = {
        "tokenize_prompts": prompt_ids,
        "tokenize_completion": lambda text: tokenizer(text)["input_ids"],
        "reply_end_ids": lambda prompt: [tiny_run.EOS],
        "pad_token_id": tiny_run.PAD,
        "hidden_states": hidden_states,
        "batch_size": 2,
    }
    return DriftProbe(tiny_run.PROBE, **{**settings, **overrides})


@torch.no_grad()
def dense_drift(base, model) -> float:
    """Mean KL(base || model) from whole logits, one unpadded row at a time."""
    tokenizer = tiny_run.tokenizer()
    total, count = 0.0, 0
    for item in tiny_run.PROBE:
        prompt = item["prompt"]
        if isinstance(prompt, str):
            context = tokenizer(prompt)["input_ids"]
        else:
            context = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        answer = [*tokenizer(item["completion"])["input_ids"], tiny_run.EOS]
        ids = torch.tensor([[*context, *answer]])
        of_base, now = (m(input_ids=ids).logits[0, len(context) - 1 : -1].log_softmax(-1) for m in (base, model))
        total += (of_base.exp() * (of_base - now)).sum().item()
        count += len(answer)
    return total / count


@pytest.mark.parametrize("frozen_head", [False, True])
def test_full_fine_tuning_is_compared_with_the_weights_before(frozen_head):
    model = tiny_run.llama()
    model.lm_head.weight.requires_grad_(not frozen_head)
    drift = probe()
    drift.capture(model)
    assert drift.measure(model) == pytest.approx(0.0, abs=1e-7)
    tiny_run.perturb(model)
    expected = dense_drift(tiny_run.llama(), model)
    assert expected > 1e-3
    assert drift.measure(model) == pytest.approx(expected, rel=1e-4)
    assert drift.num_tokens == sum(len(item["completion"].split()) + 1 for item in tiny_run.PROBE)


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_lora_is_compared_with_the_adapter_off(modules_to_save):
    """An adapter that has moved already: the base is what lies under it, whenever the probe is first used."""
    model = get_peft_model(tiny_run.llama(), tiny_run.lora(modules_to_save=modules_to_save))
    tiny_run.perturb(model)
    drift = probe()
    expected = dense_drift(tiny_run.llama(), model)
    assert expected > 1e-3
    assert drift.measure(model) == pytest.approx(expected, rel=1e-4)
    tiny_run.perturb(model, seed=2)
    assert drift.measure(model) == pytest.approx(dense_drift(tiny_run.llama(), model), rel=1e-4)
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("peft", [False, True])
def test_trainer_logs_the_drift_every_so_many_optimizer_steps(tmp_path, peft):
    run = tiny_run.trainer(
        tmp_path,
        preset="plain",
        peft_config=tiny_run.lora() if peft else None,
        drift_probe=tiny_run.PROBE,
        drift_probe_every=2,
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    with torch.no_grad():
        assert run.drift.measure(run.model) == pytest.approx(0.0, abs=1e-7)
    run.train()
    steps = {entry["step"]: entry["unisd/drift_kl"] for entry in run.state.log_history if "unisd/drift_kl" in entry}
    assert set(steps) == {0, 2, 4}
    assert steps[0] == pytest.approx(0.0, abs=1e-7)
    assert 0 < steps[2] < steps[4]
    assert steps[4] == pytest.approx(dense_drift(tiny_run.llama(), run.model), rel=1e-3)


class StopsAfter(TrainerCallback):
    """Ends training where the trainer could not foresee it: added last, as a user's callback is."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("stop", [3, 2])
def test_the_drift_is_measured_before_and_after_whatever_the_interval(tmp_path, stop):
    run = tiny_run.trainer(
        tmp_path, preset="plain", drift_probe=tiny_run.PROBE, drift_probe_every=1000, max_steps=3, logging_steps=1000
    )
    run.add_callback(StopsAfter(stop))
    run.train()
    steps = [(entry["step"], entry["unisd/drift_kl"]) for entry in run.state.log_history if "unisd/drift_kl" in entry]
    assert [step for step, _ in steps] == [0, stop]
    assert steps[0][1] == pytest.approx(0.0, abs=1e-7)
    assert steps[1][1] == pytest.approx(dense_drift(tiny_run.llama(), run.model), rel=1e-3)


def test_a_log_over_several_measurements_holds_the_latest(tmp_path):
    run = tiny_run.trainer(
        tmp_path, preset="plain", drift_probe=tiny_run.PROBE, drift_probe_every=1, max_steps=3, logging_steps=3
    )
    run.train()
    assert tiny_run.logged(run, "unisd/drift_kl")[-1] == pytest.approx(
        dense_drift(tiny_run.llama(), run.model), rel=1e-3
    )


@pytest.mark.parametrize("peft", [False, True])
def test_measuring_leaves_the_run_alone(peft):
    """No random number is drawn, no weight or mode is changed, dropout is off."""
    model = tiny_run.llama(attention_dropout=0.5)
    if peft:
        model = get_peft_model(model, tiny_run.lora(lora_dropout=0.5))
    model.train()
    drift = probe()
    drift.capture(model)
    assert drift.measure(model) == pytest.approx(0.0, abs=1e-7)
    tiny_run.perturb(model)
    weights = [parameter.clone() for parameter in model.parameters()]
    generator = torch.get_rng_state()
    first, second = drift.measure(model), drift.measure(model)
    assert first == pytest.approx(second, rel=1e-6)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), weights, strict=True))


@pytest.mark.parametrize("chat", [True, False])
def test_default_probe_is_the_packages_own(tmp_path, chat):
    from unisd.data.chat_probe import CHAT_PROBE

    tokenizer = tiny_run.tokenizer()
    if not chat:
        tokenizer.chat_template = None
    run = tiny_run.FixedRollouts(
        model=tiny_run.llama(),
        args=tiny_run.config(tmp_path, preset="plain", drift_probe_every=1),
        train_dataset=tiny_run.dataset(),
        processing_class=tokenizer,
    )
    assert run.drift.num_tokens == sum(len(item["completion"].split()) + 1 for item in CHAT_PROBE)
    run.train()
    assert tiny_run.logged(run, "unisd/drift_kl")[-1] > 0


def test_a_conversation_ends_with_the_templates_token_and_a_text_with_eos(tmp_path):
    tokenizer = tiny_run.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    end = tokenizer.convert_tokens_to_ids("<end>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} <end> w4 {% endfor %}"
        "{% if add_generation_prompt %}w3{% endif %}"
    )
    run = tiny_run.FixedRollouts(
        model=tiny_run.llama(vocab_size=tiny_run.VOCAB_SIZE + 1),
        args=tiny_run.config(tmp_path, preset="plain", drift_probe_every=1),
        train_dataset=tiny_run.dataset(),
        processing_class=tokenizer,
        drift_probe=tiny_run.PROBE,
    )
    endings = [
        ids[mask.bool()][-1].item()
        for batch in run.drift._batches
        for ids, mask in zip(batch.completion_ids, batch.completion_mask, strict=True)
    ]
    assert endings == [tiny_run.EOS, end, tiny_run.EOS]


def test_drift_under_autocast_starts_at_zero(tmp_path):
    run = tiny_run.trainer(
        tmp_path, preset="plain", bf16=True, drift_probe=tiny_run.PROBE, drift_probe_every=1, learning_rate=0.0
    )
    run.train()
    assert tiny_run.logged(run, "unisd/drift_kl") == 2 * [pytest.approx(0.0, abs=1e-7)]


def test_bad_probes_are_refused():
    with pytest.raises(RuntimeError, match=r"capture.* must be called before training"):
        probe().measure(tiny_run.llama())
    for items, message in (
        ([], "drift_probe is empty"),
        ([{"prompt": "w5"}], "item 0 of drift_probe has no 'completion'"),
    ):
        with pytest.raises(ValueError, match=message):
            DriftProbe(
                items,
                tokenize_prompts=lambda prompts: [[1]],
                tokenize_completion=lambda text: [1],
                reply_end_ids=lambda prompt: [1],
                pad_token_id=0,
                hidden_states=lambda *args: None,
            )
