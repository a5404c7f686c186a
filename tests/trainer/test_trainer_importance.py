"""Importance correction: unbiased by enumeration, the trainer's step by hand, and what is asked of TRL's sampler."""

from __future__ import annotations

import itertools
import types
from dataclasses import replace

import pytest
import torch

from tests.trainer import tiny_run
from unisd.importance import SamplerLogprobs, prefix_weights
from unisd_kernels import linear_logprobs, reference


def test_the_sum_over_places_is_unbiased():
    """All sequences of three tokens of three: E_q[sum_n w_n D_n] = E_p[sum_n D_n] for any D of the tokens before."""
    generator = torch.Generator().manual_seed(0)
    sequences = list(itertools.product(range(3), repeat=3))
    prefixes = {prefix: number for number, prefix in enumerate({s[:n] for s in sequences for n in range(3)})}
    p, q = torch.randn(2, len(prefixes), 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    divergence = torch.rand(len(prefixes), generator=generator, dtype=torch.float64)
    places = torch.tensor([[prefixes[s[:n]] for n in range(3)] for s in sequences])
    tokens = torch.tensor(sequences)
    of_p, of_q = p[places, tokens], q[places, tokens]  # [27, 3]
    weights = prefix_weights(of_p, of_q, torch.ones_like(tokens), float("inf"))
    expected = (of_p.sum(1).exp() * divergence[places].sum(1)).sum()
    found = (of_q.sum(1).exp() * (weights * divergence[places]).sum(1)).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    plain = (of_q.sum(1).exp() * divergence[places].sum(1)).sum()
    assert abs(plain - expected) > 1e-3  # there is something to correct


def test_weights_are_bounded_and_skip_what_was_not_sampled():
    student = torch.tensor([[0.0, -1.0, -1.0, -9.0], [0.0, 0.0, 0.0, 0.0]])
    sampler = torch.tensor([[-1.0, -1.0, -2.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    weights = prefix_weights(student, sampler, mask, 4.0)
    e = torch.e
    torch.testing.assert_close(weights, torch.tensor([[1.0, e, e, 4.0], [1.0, 1.0, 1.0, 1.0]]))


IN_FOUR = {"batch_statistics": "global", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}


class Sampled(tiny_run.FixedRollouts):
    """Rollouts with log-probabilities of a sampler that is a little off."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        completions = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self._sampler._rows = [sampler_scores(ids) for ids in completions]
        return completions


def sampler_scores(completion):
    return [-4.0 - 0.05 * (token % 7) for token in completion]


def expected_weights(inputs, cap):
    student = linear_logprobs(
        inputs.student_hidden.detach(), inputs.student_head, inputs.target_ids, temperature=0.7, impl="reference"
    ).logprobs.detach()
    weights = []
    for start, end in itertools.pairwise(inputs.cu_seqlens.tolist()):
        off = student[start:end] - torch.tensor(sampler_scores(inputs.target_ids[start:end].tolist()))
        weights.append((off.cumsum(0) - off).exp().clamp(max=cap))
    return torch.cat(weights)


def inputs_of(args):
    inputs = tiny_run.reference_inputs(tiny_run.llama(), tiny_run.rows(), args.num_auxiliary, args.reads_negative)
    return tiny_run.with_mixture(inputs, args)


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [("plain", {}), ("unisd_star", {}), ("agreement_sequence", {}), ("agreement_token", IN_FOUR)],
)
def test_a_step_is_the_references_with_the_weights(tmp_path, preset, overrides):
    """The product of both weights; the metrics tell them apart."""
    run = tiny_run.trainer(tmp_path, cls=Sampled, preset=preset, temperature=0.7, **overrides)
    inputs, args = inputs_of(run.args), run.args
    weights = expected_weights(inputs, args.vllm_importance_sampling_clip_max)
    assert weights.min() < 0.9
    expected = reference.unisd_loss(replace(inputs, token_weights=weights), tiny_run.reference_spec(args)).loss
    run.train()
    assert tiny_run.losses(run)[0] == pytest.approx(expected.item(), rel=1e-5)
    assert tiny_run.logged(run, "unisd/importance_weight")[0] == pytest.approx(weights.mean().item(), rel=1e-4)
    assert tiny_run.logged(run, "unisd/importance_weight_min")[0] == pytest.approx(weights.min().item(), rel=1e-4)
    agreement = reference.unisd_loss(inputs, tiny_run.reference_spec(args)).weights
    for logged in tiny_run.logged(run, "unisd/agreement_weight"):
        assert logged == pytest.approx(agreement.mean().item(), rel=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_weights_are_those_of_the_whole_model_and_of_the_tokens_that_count(tmp_path, dropout):
    """Dropout is no part of what was sampled."""
    model = tiny_run.llama(attention_dropout=dropout)
    run = tiny_run.trainer(
        tmp_path, model, cls=Sampled, preset="plain", temperature=0.7, top_entropy_quantile=0.7, skip_first_tokens=1
    )
    seen, functions = [], run.step.functions

    def watched(*args, **kwargs):
        seen.append((kwargs["target_ids"], kwargs["token_weights"]))
        return functions.unisd_loss(*args, **kwargs)

    run.step.functions = replace(functions, unisd_loss=watched)
    inputs = inputs_of(run.args)
    weights = expected_weights(inputs, run.args.vllm_importance_sampling_clip_max)
    run.train()
    ((ids, found),) = seen
    counted = weights.numel() - tiny_run.NUM_ROWS
    assert found.numel() == ids.numel() == -(-7 * counted // 10)
    for token, weight in zip(ids, found, strict=True):
        assert (weights[inputs.target_ids == token] - weight).abs().min() < 1e-4


def test_what_is_asked_of_the_sampler():
    asked = []

    def generate(prompts):
        asked.append(sampler.logprobs)
        return [[1]], [[5, 6], [7]], [[[-0.5], [None]], [[-2.0]]], None

    sampler = types.SimpleNamespace(generate=generate, logprobs=None)
    recorder = SamplerLogprobs()
    with recorder.recording(sampler, True):
        sampler.generate(prompts=[])
    assert asked == [0]
    assert (sampler.generate, sampler.logprobs) == (generate, None)
    output = {"completion_mask": torch.tensor([[1, 1], [1, 0]])}
    recorder.put(output)
    expected = torch.tensor([[-0.5, torch.nan], [-2.0, 0.0]])
    torch.testing.assert_close(output["sampler_logprobs"], expected, equal_nan=True)
    with pytest.raises(ValueError, match="cannot be used with tools"):
        recorder.put({"completion_mask": torch.tensor([[1, 1], [1, 1]])})
    with recorder.recording(sampler, False):
        pass
    output = {"completion_mask": torch.tensor([[1]])}
    recorder.put(output)
    assert "sampler_logprobs" not in output


def test_settings(tmp_path):
    with pytest.raises(ValueError, match="has no effect without use_vllm"):
        tiny_run.config(tmp_path, vllm_importance_sampling_correction=True)
    with pytest.raises(ValueError, match="vllm_importance_sampling_clip_max"):
        tiny_run.config(tmp_path, vllm_importance_sampling_clip_max=0.0)
    weighed = {"vllm_importance_sampling_correction": True, "use_vllm": True, "batch_statistics": "global"}
    for preset in ("unisd_star", "plain"):  # without agreement, these weights are all there is to sum
        with pytest.raises(ValueError, match=r"weights that the sum of weights .* set weight_normalization='count'"):
            tiny_run.config(tmp_path, preset=preset, normalization="token", **weighed)
    settings = {"preset": "unisd_star", "normalization": "token", "weight_normalization": "count"}
    assert tiny_run.config(tmp_path, **settings, **weighed).use_vllm


def test_without_vllm_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("unisd.generation.colocated.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"use_vllm=True needs the package vllm: pip install vllm .* or leave use"):
        tiny_run.trainer(tmp_path, use_vllm=True)
