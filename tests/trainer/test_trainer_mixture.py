"""A teacher that is a mixture of views: the right one, for no product of its own, beside every other mechanism."""

import math
import warnings
from unittest import mock

import pytest
import torch
from peft import get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM

from tests.trainer import tiny_run
from unisd.config import UniSDConfig
from unisd.step import LossFunctions
from unisd_kernels import reference, unisd_loss
from unisd_kernels.reference.loss import reduce_per_token

MIXTURES = ["consensus", "contrastive", "pmi"]


def made_of(mixture, alpha=0.8):
    return {"teacher_mixture": mixture} | ({} if mixture == "consensus" else {"mixture_alpha": alpha})


def first_step(tmp_path, model=None, **overrides):
    gradients = tiny_run.Gradients()
    run = tiny_run.trainer(tmp_path, model, **overrides)
    run.add_callback(gradients)
    run.train()
    return run, tiny_run.losses(run)[0], gradients.steps[0]


def adapted(**overrides):
    """A LoRA model whose adapter is away from zero."""
    result = get_peft_model(tiny_run.llama(), tiny_run.lora(**overrides))
    tiny_run.perturb(result)
    return result


@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_loss_is_that_of_the_dense_mixture(tmp_path, mixture):
    """A mixture of distributions, not of hidden states; and no view is scored besides."""
    overrides = {"preset": "plain", "num_auxiliary": 3, **made_of(mixture)}
    inputs = tiny_run.reference_inputs(tiny_run.llama(), tiny_run.rows(), 3, True)
    head = inputs.teacher_head
    views, weights = {
        "consensus": ([inputs.teacher_hidden, *inputs.auxiliary_hidden], [0.25] * 4),
        "contrastive": ([inputs.teacher_hidden, inputs.negative_hidden], [1.8, -0.8]),
        "pmi": ([inputs.teacher_hidden, inputs.student_hidden.detach()], [1.8, -0.8]),
    }[mixture]
    teacher = reference.mixture_log_probs(views, weights, [head] * len(views), 0.7)
    student = reference.linear_logits(inputs.student_hidden, head, 0.7).log_softmax(-1)
    divergence = reference.divergence_from_log_probs(student, teacher, 0.0)
    expected = reduce_per_token(divergence, inputs.cu_seqlens, "sequence").item()
    with mock.patch("unisd_kernels.backends.engine.Engine.score", side_effect=AssertionError("a view was scored")):
        run, loss, _ = first_step(tmp_path, **overrides)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert tiny_run.logged(run, "unisd/divergence")[0] == pytest.approx(float(divergence.mean()), rel=1e-5)
    entropy = -(teacher.exp() * teacher).sum(-1).mean()
    assert tiny_run.logged(run, "unisd/teacher_entropy")[0] == pytest.approx(float(entropy), rel=1e-5)
    assert not any(name.startswith("unisd/agreement") for name in run.state.log_history[0])


@pytest.mark.parametrize(
    ("mixture", "passes"), [("consensus", "padded"), *((mixture, "prefix") for mixture in MIXTURES)]
)
def test_beside_all_of_unisd_star(tmp_path, mixture, passes):
    """The mixture is the teacher of every term; agreement and contrast still read their own views."""
    overrides = {"preset": "unisd_star", "agreement_gamma": 2.0, **made_of(mixture, 0.3)}
    overrides |= {"contrastive_weight": 1.0, "feature_weight": 1.0, "ema": "adapter"}
    args = tiny_run.config(tmp_path, **overrides)
    expected_loss, expected = tiny_run.reference_step(adapted(), tiny_run.rows(), args)
    run, loss, gradients = first_step(tmp_path, adapted(), view_passes=passes, **overrides)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    tiny_run.assert_same_gradients(gradients, expected)
    assert "unisd/agreement_weight" in run.state.log_history[0]


@pytest.mark.parametrize("mixture", ["consensus", "contrastive"])
@pytest.mark.parametrize("teacher", [{"ema": "full", "ema_decay": 1.0}, {"teacher": "base", "ema": "none"}])
def test_under_a_head_of_the_teachers_own(tmp_path, mixture, teacher):
    """Full fine-tuning: from the second step on the student's head is another than the one that all views have."""
    overrides = {"preset": "plain", **made_of(mixture), **teacher}
    run = tiny_run.trainer(tmp_path, tiny_run.llama(), max_steps=2, **overrides)
    gradients = tiny_run.Gradients()
    run.add_callback(gradients)
    run.train()
    student = tiny_run.llama()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter -= 0.05 * gradients.steps[0][name]
    expected_loss, expected = tiny_run.reference_step(student, tiny_run.rows(), run.args, tiny_run.llama())
    assert tiny_run.losses(run)[1] == pytest.approx(expected_loss, rel=1e-4)
    tiny_run.assert_same_gradients(gradients.steps[1], expected, tolerance=1e-4)


def test_pmi_wants_one_head(tmp_path):
    for overrides in ({"ema": "full"}, {"teacher": "base", "ema": "none"}):
        with pytest.raises(
            ValueError, match=r"teacher_mixture='pmi' .* needs one head, but the teacher \((full|base)\)"
        ):
            tiny_run.trainer(tmp_path, preset="pmi", **overrides)
        model = tiny_run.llama()
        model.lm_head.requires_grad_(False)
        assert tiny_run.trainer(tmp_path, model, preset="pmi", **overrides).step.args.teacher_mixture == "pmi"
    with pytest.raises(ValueError, match=r"the teacher \(adapter\) has another"):
        tiny_run.trainer(tmp_path, adapted(modules_to_save=["lm_head"]), preset="pmi", ema="adapter")
    tiny_run.trainer(tmp_path, adapted(), preset="pmi", ema="merged")


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_soft_cap_is_refused_before_anything_is_read(tmp_path, mixture):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "final_logit_softcapping": 30.0}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, **special))
    message = (
        rf"teacher_mixture='{mixture}' mixes hidden states, but the logits of Gemma2ForCausalLM have a soft cap \(30\)"
    )
    with (
        mock.patch("unisd.rows.RowGate.admit", side_effect=AssertionError("rows were read")),
        pytest.raises(ValueError, match=message),
    ):
        tiny_run.trainer(tmp_path, model, preset="plain", teacher_mixture=mixture)


@pytest.mark.parametrize("mixture", ["contrastive", "pmi"])
def test_with_selective_agreement(tmp_path, mixture):
    """The teacher's states were made when the step was ranked; 0.99 of 4 sequences are 4."""
    overrides = {"preset": "agreement_token", "teacher_mixture": mixture, "agreement_gamma": 2.0}
    args = tiny_run.config(tmp_path, **overrides)
    expected_loss, expected = tiny_run.reference_step(tiny_run.llama(), tiny_run.rows(), args)
    _, loss, gradients = first_step(tmp_path, agreement_fraction=0.99, **overrides)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    tiny_run.assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_most_entropic_tokens_alone(tmp_path, mixture):
    overrides = {"preset": "plain", "teacher_mixture": mixture, "top_entropy_quantile": 0.5}
    args = tiny_run.config(tmp_path, **overrides)
    whole = tiny_run.reference_inputs(tiny_run.llama(), tiny_run.rows(), 0, False)
    student = reference.linear_logprobs(
        whole.student_hidden, whole.student_head, whole.target_ids, 0.7, return_entropy=True
    )
    chosen = torch.zeros(whole.num_rows, dtype=torch.bool)
    chosen[student.entropy.topk(-(-chosen.numel() // 2)).indices] = True
    keep = [part.tolist() for part in chosen.split(whole.cu_seqlens.diff().tolist())]
    expected, _ = tiny_run.reference_step(tiny_run.llama(), tiny_run.rows(), args, keep=keep)
    _, loss, _ = first_step(tmp_path, **overrides)
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("preset", "reads_negative"), [("pmi", False), ("contrastive_teacher", True)])
def test_no_gradient_reaches_the_teacher_and_no_view_is_given_twice(tmp_path, preset, reads_negative):
    given = []

    def spy(**arguments):
        given.append(arguments)
        return unisd_loss(**arguments)

    run = tiny_run.trainer(tmp_path, preset=preset)
    run.step.functions = LossFunctions(unisd_loss=spy)
    run.train()
    assert given[0]["student_hidden"].requires_grad
    assert not given[0]["teacher_hidden"].requires_grad
    assert "negative_hidden" not in given[0]
    assert run.step.contexts.num_auxiliary == 0
    assert run.step.contexts.negative == reads_negative


def test_the_view_that_is_not_finite_is_named(tmp_path):
    """The mixture is, then, too; its reason stands beside it."""

    class Spoilt(tiny_run.FixedRollouts):
        def _get_last_hidden_state(self, model, ids, mask, length):
            hidden = super()._get_last_hidden_state(model, ids, mask, length)
            self.passes = getattr(self, "passes", 0) + 1
            return hidden * math.nan if self.passes == 2 else hidden  # teacher, negative, student

    run = tiny_run.trainer(tmp_path, cls=Spoilt, preset="contrastive_teacher", view_passes="padded")
    with pytest.raises(FloatingPointError, match=r"hidden states of: the teacher \(.*, the negative context \(token 0"):
        run.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_mixture": "mean"}, "must be one of 'self', 'consensus', 'contrastive', 'pmi', got 'mean'"),
        ({"teacher_mixture": "pmi", "mixture_alpha": 0.0}, "mixture_alpha must be > 0, got 0.0"),
        (
            {"preset": "unisd_star", "teacher_mixture": "consensus", "agreement_fraction": 0.5},
            "reads every sequence under the auxiliary contexts, of which agreement_fraction=0.5 would leave some out",
        ),
        (
            {"preset": "sft", "teacher_mixture": "consensus"},
            "teacher_mixture='consensus' has no effect with preset='sft'",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_run.config(tmp_path, **{"preset": "plain", **settings})


def test_what_does_nothing_is_said(tmp_path):
    for mixture in ("self", "consensus"):
        with pytest.warns(UserWarning, match=f"mixture_alpha=0.7 has no effect with teacher_mixture='{mixture}'"):
            tiny_run.config(tmp_path, preset="plain", teacher_mixture=mixture, mixture_alpha=0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        UniSDConfig(str(tmp_path), use_cpu=True, preset="pmi", mixture_alpha=0.7)


def test_one_auxiliary_context_makes_a_consensus_but_no_agreement(tmp_path):
    items = tiny_run.rows(num_auxiliary=1)
    run, loss, _ = first_step(tmp_path, preset="consensus", num_auxiliary=1, items=items)
    expected, _ = tiny_run.reference_step(tiny_run.llama(), items, run.args)
    assert loss == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="one context has no variance"):
        tiny_run.config(tmp_path, preset="consensus", num_auxiliary=1, agreement="token")


@pytest.mark.parametrize(
    ("settings", "column", "advice"),
    [
        ({"preset": "consensus"}, "auxiliary_prompts", "set teacher_mixture='self'"),
        (
            {"preset": "agreement_token", "teacher_mixture": "consensus"},
            "auxiliary_prompts",
            "set agreement='none' and teacher_mixture='self'",
        ),
        ({"preset": "contrastive_teacher"}, "negative_prompt", "set teacher_mixture='self'"),
        ({"preset": "contrastive"}, "negative_prompt", "set contrastive_weight=0"),
    ],
)
def test_a_missing_column_is_named_with_what_needs_it(tmp_path, settings, column, advice):
    items = [{name: value for name, value in row.items() if name != column} for row in tiny_run.rows()]
    with pytest.raises(ValueError, match=rf"column '{column}' is needed .*; add it, or {advice}$"):
        tiny_run.trainer(tmp_path, items=items, **settings)
