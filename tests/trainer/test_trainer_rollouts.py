"""Rollouts are samples of the model's own distribution, whatever its generation config says."""

import pytest
import torch
from transformers import GenerationConfig

from tests.trainer import tiny_run
from unisd.trainer import UniSDTrainer

# What a checkpoint's generation_config.json may ask for. At a temperature near 0 a sample is the argmax.
BENT = {
    "repetition_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 6,
    "suppress_tokens": list(range(2, tiny_run.VOCAB_SIZE, 2)),
    "bad_words_ids": [[token] for token in range(3, tiny_run.VOCAB_SIZE, 2)],
    "sequence_bias": [[[5], 1e6]],
    "top_k": 1,
    "typical_p": 0.01,
    "epsilon_cutoff": 0.5,
    "min_p": 0.9,
}


def rollouts(tmp_path, temperature, peft, prompts, **bent):
    model = tiny_run.llama()
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0, **bent)
    run = tiny_run.trainer(
        tmp_path,
        model,
        cls=UniSDTrainer,
        preset="plain",
        temperature=temperature,
        peft_config=tiny_run.lora() if peft else None,
    )
    torch.manual_seed(0)
    found = run._generate_single_turn(prompts, None, {})
    kept = model.generation_config.to_dict()
    for name, value in bent.items():
        assert kept[name] == value, f"{name} of the model's own config was not put back"
    return run, found


@pytest.mark.parametrize("peft", [False, True])
def test_a_cold_rollout_is_the_argmax(tmp_path, peft):
    prompts = [[5, 6], [9, 8, 7]]
    greedy = {name: BENT[name] for name in list(BENT)[:6]}
    run, found = rollouts(tmp_path, 1e-4, peft, prompts, **greedy)
    model = run.accelerator.unwrap_model(run.model)
    for prompt, completion in zip(prompts, found, strict=True):
        expected: list[int] = []
        while len(expected) < 6 and tiny_run.EOS not in expected:
            with torch.no_grad():
                expected.append(model(torch.tensor([prompt + expected])).logits[0, -1].argmax().item())
        assert completion == expected


def test_samples_have_the_distribution_that_the_loss_scores(tmp_path):
    """First tokens of 4000 rollouts against softmax(z / 0.7): the truncations of the config would empty its tail."""
    count = 4000
    run, found = rollouts(tmp_path, 0.7, False, [[5, 6]] * count, **{name: BENT[name] for name in list(BENT)[6:]})
    with torch.no_grad():
        probabilities = (run.model(torch.tensor([[5, 6]])).logits[0, -1] / 0.7).softmax(-1)
    seen = torch.bincount(torch.tensor([c[0] for c in found]), minlength=tiny_run.VOCAB_SIZE) / count
    deviation = (probabilities * (1 - probabilities) / count).sqrt()
    assert ((seen - probabilities).abs() < 6 * deviation + 1e-3).all()
    assert (seen > 0).sum() > 10
