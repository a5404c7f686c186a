"""One optimizer step against a dense computation of unpadded rows; accumulation, masks, precision, evaluation."""

import warnings
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from datasets import IterableDataset
from peft import get_peft_model

from tests.trainer import tiny_run
from unisd.guards import check_sharding
from unisd.presets import PRESETS, is_paper
from unisd.step import LossFunctions
from unisd_kernels import unisd_loss


def first_step(tmp_path, model, items=None, **overrides):
    """(trainer, loss, gradients) of the first step."""
    gradients = tiny_run.Gradients()
    run = tiny_run.trainer(tmp_path, model, items=items, **overrides)
    run.add_callback(gradients)
    run.train()
    return run, tiny_run.losses(run)[0], gradients.steps[0]


RECIPES = [name for name, preset in PRESETS.items() if preset.method == "unisd"]


@tiny_run.with_the_newest_trl
@pytest.mark.parametrize("preset", [name for name in RECIPES if not is_paper(name)])
def test_first_step_of_every_preset_equals_the_dense_computation(tmp_path, preset):
    args = tiny_run.config(tmp_path, preset=preset)
    expected_loss, expected = tiny_run.reference_step(tiny_run.llama(), tiny_run.rows(), args)
    model = tiny_run.llama()
    run, loss, gradients = first_step(tmp_path, model, preset=preset, max_steps=3)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    tiny_run.assert_same_gradients(gradients, expected)
    assert all(value == value and value > 0 for value in tiny_run.losses(run))
    assert len(tiny_run.losses(run)) == 3


def test_feature_matching_alone_makes_no_logits(tmp_path):
    """Neither their products nor their metrics; TRL's entropy would be a zero that nobody measured."""
    with (
        mock.patch("unisd_kernels.backends.engine.Engine.divergence", side_effect=AssertionError("logits were made")),
        mock.patch("unisd_kernels.backends.engine.Engine.score", side_effect=AssertionError("logits were made")),
    ):
        run, loss, _ = first_step(tmp_path, tiny_run.llama(), preset="match_repr")
    logs = run.state.log_history[0]
    assert loss > 0
    assert logs["unisd/feature_distance"] > 0
    assert logs["unisd/completion_tokens_per_second"] > 0
    assert not {"entropy", "unisd/divergence", "unisd/student_entropy"} & logs.keys()
    run, _, _ = first_step(tmp_path / "joint", tiny_run.llama(), preset="match_joint")
    assert {"entropy", "unisd/divergence", "unisd/student_entropy"} <= run.state.log_history[0].keys()


@tiny_run.with_the_newest_trl
@pytest.mark.parametrize(
    "overrides",
    [
        {"preset": "plain", "beta": 1.0},
        {"preset": "plain", "beta": 0.5, "temperature": 1.3},
        {"preset": "clip", "clip_cap": 1.0},
        {"preset": "clip", "clip_quantile": 0.5},
        {"preset": "plain", "normalization": "token"},
        {"preset": "agreement_token", "agreement_gamma": 2.0, "agreement_statistic": "range", "normalization": "token"},
        {"preset": "agreement_sequence", "agreement_gamma": 2.0},
        {"preset": "agreement_sequence", "agreement_gamma": 2.0, "weight_normalization": "weighted"},
        {"preset": "unisd_star", "agreement_gamma": 2.0, "contrastive_weight": 1.0, "feature_weight": 1.0},
        {"preset": "plain", "impl": "reference"},
    ],
)
def test_settings_reach_the_loss(tmp_path, overrides):
    args = tiny_run.config(tmp_path, **overrides)
    expected_loss, expected = tiny_run.reference_step(tiny_run.llama(), tiny_run.rows(), args)
    _, loss, gradients = first_step(tmp_path, tiny_run.llama(), **overrides)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    tiny_run.assert_same_gradients(gradients, expected)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    args = tiny_run.config(tmp_path, preset="unisd_star")
    expected_loss, expected = tiny_run.reference_step(tiny_run.llama(), tiny_run.rows(), args)
    _, loss, gradients = first_step(tmp_path, tiny_run.llama(), preset="unisd_star", gradient_checkpointing=True)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    tiny_run.assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("ema", ["adapter", "merged", "none"])
def test_lora_step_equals_the_dense_computation(tmp_path, ema, checkpointing):
    """The head is frozen and only the adapter has gradients; the adapter starts away from zero."""

    def model():
        result = get_peft_model(tiny_run.llama(), tiny_run.lora())
        tiny_run.perturb(result)
        return result

    overrides = {"preset": "unisd_star", "ema": ema, "agreement_gamma": 2.0}
    args = tiny_run.config(tmp_path, **overrides)
    expected_loss, expected = tiny_run.reference_step(model(), tiny_run.rows(), args)
    _, loss, gradients = first_step(tmp_path, model(), gradient_checkpointing=checkpointing, **overrides)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients
    assert all("lora_" in name for name in gradients)
    tiny_run.assert_same_gradients(gradients, expected)


def test_padding_moves_nothing_even_with_absolute_positions(tmp_path):
    """GPT-2 learns absolute positions: the oracle sees each row alone and unpadded, the trainer a padded batch."""
    args = tiny_run.config(tmp_path, preset="unisd_star")
    expected_loss, expected = tiny_run.reference_step(tiny_run.gpt2(), tiny_run.rows(), args)
    _, loss, gradients = first_step(tmp_path, tiny_run.gpt2(), preset="unisd_star")
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    tiny_run.assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("make", [tiny_run.llama, tiny_run.gpt2])
def test_more_padding_moves_nothing(tmp_path, make):
    overrides = {"preset": "unisd_star", "agreement_gamma": 2.0}
    _, loss, gradients = first_step(tmp_path, make(), **overrides)
    _, padded_loss, padded = first_step(tmp_path, make(), pad_to_multiple_of=16, **overrides)
    assert padded_loss == pytest.approx(loss, rel=1e-5)
    tiny_run.assert_same_gradients(padded, gradients)


def test_same_prompt_for_teacher_and_student_gives_no_divergence(tmp_path):
    items = [{"prompt": row["prompt"], "teacher_prompt": row["prompt"]} for row in tiny_run.rows()]
    run, loss, gradients = first_step(tmp_path, tiny_run.llama(), items=items, preset="plain")
    assert abs(loss) < 1e-6
    assert tiny_run.logged(run, "unisd/divergence")[0] < 1e-6
    assert max(gradient.abs().max() for gradient in gradients.values()) < 1e-6


@pytest.mark.parametrize("normalization", ["sequence", "token"])
@pytest.mark.parametrize("preset", ["plain", "contrastive", "match_joint", "clip"])
def test_gradient_accumulation_equals_the_big_batch(tmp_path, preset, normalization):
    overrides = {"preset": preset, "normalization": normalization, "clip_cap": 1.5 if preset == "clip" else None}
    big, small = tiny_run.llama(), tiny_run.llama()
    _, big_loss, _ = first_step(tmp_path, big, **overrides)
    _, small_loss, _ = first_step(
        tmp_path, small, per_device_train_batch_size=2, gradient_accumulation_steps=2, **overrides
    )
    assert small_loss == pytest.approx(big_loss, rel=1e-5)
    for (name, one), other in zip(big.named_parameters(), small.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=2e-6), name


def test_the_two_normalizations_differ_here(tmp_path):
    """Else the test above could not tell them apart."""
    sequence = first_step(tmp_path, tiny_run.llama(), preset="plain", normalization="sequence")[1]
    token = first_step(tmp_path, tiny_run.llama(), preset="plain", normalization="token")[1]
    assert abs(sequence - token) > 1e-3


class ToolMask(tiny_run.FixedRollouts):
    """Marks tokens of every completion as tool results."""

    masked = 1

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        output["tool_mask"] = torch.ones_like(output["completion_mask"])
        output["tool_mask"][:, : self.masked] = 0
        return output


def test_tokens_of_tools_are_left_out(tmp_path):
    keep = []
    for item in tiny_run.rows():
        length = len(tiny_run.completion_of(tiny_run.tokenized(item["prompt"])))
        keep.append([False] + [True] * (length - 1))
    args = tiny_run.config(tmp_path, preset="unisd_star")
    expected_loss, expected = tiny_run.reference_step(tiny_run.llama(), tiny_run.rows(), args, keep=keep)
    _, loss, gradients = first_step(tmp_path, tiny_run.llama(), cls=ToolMask, preset="unisd_star")
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    tiny_run.assert_same_gradients(gradients, expected)


class AllMasked(ToolMask):
    masked = 99


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_all_masked_batch_gives_zero_and_a_warning(tmp_path, fraction):
    model = tiny_run.llama()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.warns(UserWarning, match="every completion token is masked"):
        run, loss, gradients = first_step(
            tmp_path, model, cls=AllMasked, preset="unisd_star", agreement_fraction=fraction
        )
    assert loss == 0.0
    assert all(torch.all(gradient == 0) for gradient in gradients.values())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert tiny_run.logged(run, "unisd/nonfinite_share") == [0.0]


class Autocast(tiny_run.FixedRollouts):
    """Notes whether autocast is on where the loss is computed."""

    def _unisd_loss(self, *args):
        self.autocast = torch.is_autocast_enabled("cpu")
        return super()._unisd_loss(*args)


@pytest.mark.parametrize("ema", ["none", "full", "adapter", "merged"])
def test_bf16_runs_under_autocast_and_every_weight_gets_its_gradient(tmp_path, ema):
    """The teacher's passes fill autocast's cache of 16-bit weights, with swapped weights and without a graph; it must
    not reach the student."""

    def model():
        if ema not in ("adapter", "merged"):
            return tiny_run.llama()
        result = get_peft_model(tiny_run.llama(), tiny_run.lora())
        tiny_run.perturb(result, scale=0.3)
        return result

    _, loss, exact = first_step(tmp_path, model(), preset="unisd_star", ema=ema)
    run, rounded_loss, gradients = first_step(tmp_path, model(), cls=Autocast, preset="unisd_star", ema=ema, bf16=True)
    assert run.autocast
    assert rounded_loss == pytest.approx(loss, rel=0.05)
    assert gradients.keys() == exact.keys()
    for name, gradient in gradients.items():
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0)
        assert cosine > 0.98, (name, cosine)


def test_model_in_16_bits_trains(tmp_path):
    run = tiny_run.trainer(tmp_path, tiny_run.llama().bfloat16(), preset="unisd_star", max_steps=2, ema_decay=0.5)
    run.train()
    assert len(tiny_run.losses(run)) == 2


def test_dropout_is_off_for_the_teacher_and_on_for_the_student(tmp_path):
    items = [{"prompt": row["prompt"], "teacher_prompt": row["prompt"]} for row in tiny_run.rows()]
    model = tiny_run.llama(attention_dropout=0.5)
    seen = []

    def record(module, args, kwargs):
        seen.append((module.training, torch.is_grad_enabled()))

    model.model.layers[0].self_attn.register_forward_pre_hook(record, with_kwargs=True)
    _, loss, _ = first_step(tmp_path, model, items=items, preset="plain")
    assert seen[-2:] == [(False, False), (True, True)]  # teacher, then student
    assert all(each == (False, False) for each in seen[:-2])  # the check of the head, at construction
    assert loss > 1e-3  # same prompt, but the student's attention is dropped out
    assert model.training


def test_evaluation_gives_the_loss_of_the_batch(tmp_path):
    run = tiny_run.FixedRollouts(
        model=tiny_run.llama(),
        args=tiny_run.config(tmp_path, preset="unisd_star", per_device_eval_batch_size=4),
        train_dataset=tiny_run.dataset(),
        eval_dataset=tiny_run.dataset(),
        processing_class=tiny_run.tokenizer(),
    )
    heads = []

    def record(student_head, **arguments):
        heads.append(student_head.weight.requires_grad)
        return unisd_loss(student_head=student_head, **arguments)

    run.step.functions = LossFunctions(unisd_loss=record)
    metrics = run.evaluate()
    assert heads == [False]  # a trained head would cost its gradient in vain
    expected, _ = tiny_run.reference_step(tiny_run.llama(), tiny_run.rows(), run.args)
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert tiny_run.logged(run, "eval_unisd/divergence")[0] > 0
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_metrics_are_token_means_over_all_micro_batches(tmp_path):
    from unisd_kernels import reference

    overrides = {"preset": "unisd_star", "clip_cap": 1.5, "normalization": "token"}
    run, _, _ = first_step(
        tmp_path, tiny_run.llama(), per_device_train_batch_size=2, gradient_accumulation_steps=2, **overrides
    )
    inputs = tiny_run.reference_inputs(tiny_run.llama(), tiny_run.rows(), 3, True)
    result = reference.unisd_loss(inputs, tiny_run.reference_spec(run.args))
    expected = {
        "unisd/divergence": result.divergence.mean(),
        "unisd/clipped_share": result.clipped.float().mean(),
        "unisd/contrastive": result.contrastive.mean(),
        "unisd/contrastive_active": (result.contrastive > 0).float().mean(),
        "unisd/disagreement": result.disagreement.mean(),
        "unisd/feature_distance": result.feature_distance.mean(),
        "unisd/student_entropy": result.student_entropy.mean(),
        "unisd/teacher_entropy": result.teacher_entropy.mean(),
        "unisd/auxiliary_share": 1.0,
        "unisd/nonfinite_share": 0.0,
    }
    for name, value in expected.items():
        assert tiny_run.logged(run, name) == [pytest.approx(float(value), rel=1e-4)], name
    least, mean = (tiny_run.logged(run, f"unisd/agreement_weight{suffix}")[0] for suffix in ("_min", ""))
    assert 0 < least < mean < 1
    assert tiny_run.logged(run, "unisd/completion_tokens_per_second")[0] > 0
    assert tiny_run.logged(run, "unisd/peak_memory_gib")[0] > 0


def test_nonfinite_loss_of_an_evaluation_is_reported_once_with_its_context(tmp_path):
    model = tiny_run.llama()
    run = tiny_run.FixedRollouts(
        model=model,
        args=tiny_run.config(tmp_path, preset="clip"),
        train_dataset=tiny_run.dataset(),
        eval_dataset=tiny_run.dataset(),
        processing_class=tiny_run.tokenizer(),
    )
    with torch.no_grad():
        model.lm_head.weight[5, 5] = float("nan")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            run.evaluate()
    messages = [str(w.message) for w in caught if "NaN or infinite" in str(w.message)]
    assert len(messages) == 1
    assert "preset 'clip'" in messages[0]
    assert "divergence" in messages[0]


def test_settings_that_an_engine_cannot_serve_are_refused(tmp_path):
    engine, lora = SimpleNamespace(fsdp_version=1, is_zero3=False), get_peft_model(tiny_run.llama(), tiny_run.lora())
    check = partial(check_sharding, engine=engine, deepspeed=None)
    with pytest.raises(ValueError, match=r"ema='auto' has weights of its own, .* under FSDP1: use FSDP2"):
        check(tiny_run.config(tmp_path, preset="ema"), tiny_run.llama())
    base = tiny_run.config(tmp_path, preset="plain", teacher="base")
    engine.fsdp_version, engine.is_zero3 = None, True
    for setting in ({"offload_param": {"device": "cpu"}}, {"zero_hpz_partition_size": 2}, {"mics_shard_size": 2}):
        config = {"zero_optimization": {"stage": 3, **setting}}
        with pytest.raises(
            ValueError, match=rf"teacher='base' has weights of its own, .* with {next(iter(setting))}: "
        ):
            check(base, tiny_run.llama(), deepspeed=config)
        check(base, lora, deepspeed=config)
    none = {"offload_param": {"device": "none"}, "zero_hpz_partition_size": 1, "mics_shard_size": -1}
    check(base, tiny_run.llama(), deepspeed={"zero_optimization": {"stage": 3, **none}})
    check(base, lora, deepspeed={})
    engine.fsdp_version, engine.is_zero3 = 2, False
    check(base, tiny_run.llama())
    with pytest.raises(ValueError, match="drift_budget cannot scale the learning rate of DeepSpeed"):
        check(tiny_run.config(tmp_path, drift_budget=0.1, drift_probe_every=1), lora, deepspeed={})


def test_streamed_dataset_trains_and_its_rows_are_checked(tmp_path):
    def run(items):
        return tiny_run.FixedRollouts(
            model=tiny_run.llama(),
            args=tiny_run.config(tmp_path, preset="contrastive"),
            train_dataset=IterableDataset.from_generator(lambda: iter(items)),
            processing_class=tiny_run.tokenizer(),
        )

    streamed = run(tiny_run.rows())
    streamed.train()
    assert len(tiny_run.losses(streamed)) == 1
    with pytest.raises(ValueError, match="column 'negative_prompt'"):
        run([{"prompt": row["prompt"], "teacher_prompt": row["prompt"]} for row in tiny_run.rows()]).train()


def test_what_is_refused(tmp_path):
    from peft import PromptTuningConfig
    from trl import DistillationConfig

    with pytest.raises(ValueError, match="adapter to `lm_head`"):
        tiny_run.trainer(tmp_path, peft_config=tiny_run.lora(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="Prompt-learning"):
        tiny_run.trainer(tmp_path, peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    common = {"model": tiny_run.llama(), "train_dataset": tiny_run.dataset(), "processing_class": tiny_run.tokenizer()}
    with pytest.raises(ValueError, match="takes no teacher_model"):
        tiny_run.FixedRollouts(**common, args=tiny_run.config(tmp_path), teacher_model=tiny_run.llama())
    with pytest.raises(TypeError, match="args must be a UniSDConfig"):
        tiny_run.FixedRollouts(**common, args=DistillationConfig(str(tmp_path), use_cpu=True))
    with pytest.raises(TypeError, match="processing_class must be a tokenizer"):
        tiny_run.FixedRollouts(**{**common, "processing_class": object()}, args=tiny_run.config(tmp_path))
