"""`self_distillation_loss` with a mixture of teachers: the trainer's own loss and gradient, and the dense formulas'."""

from unittest import mock

import pytest
from peft import get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM

from tests.trainer import tiny_run
from unisd import completion_batch, self_distillation_loss
from unisd_kernels import reference
from unisd_kernels.reference.loss import reduce_per_token

MIXTURES = ["consensus", "contrastive", "pmi"]
ALPHA = 0.8


def batches(num_auxiliary=3):
    """The views of `tiny_run.rows()`, and the completions that `tiny_run.FixedRollouts` would give them."""
    texts, items = tiny_run.tokenizer(), tiny_run.rows(num_auxiliary)
    replies = [texts.decode(tiny_run.completion_of(tiny_run.tokenized(item["prompt"]))) for item in items]

    def view(prompts):
        return completion_batch(texts, prompts, replies, include_eos=False)

    return {
        "student": view([item["prompt"] for item in items]),
        "teacher": view([item["teacher_prompt"] for item in items]),
        "auxiliary": [view([item["auxiliary_prompts"][k] for item in items]) for k in range(num_auxiliary)],
        "negative": view([item["negative_prompt"] for item in items]),
    }


def only(views, *names):
    return {name: views[name] for name in ("student", "teacher", *names)}


def gradients_of(model):
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def gemma2_with_a_soft_cap():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "final_logit_softcapping": 30.0}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, pad_token_id=0, eos_token_id=1, bos_token_id=None))


def dense_loss(mixture, teacher=None):
    """Mean forward KL at temperature 0.7 to the mixture of whole distributions."""
    inputs = tiny_run.reference_inputs(tiny_run.llama(), tiny_run.rows(), 3, True, teacher)
    hidden, weights = {
        "consensus": ([inputs.teacher_hidden, *inputs.auxiliary_hidden], [0.25] * 4),
        "contrastive": ([inputs.teacher_hidden, inputs.negative_hidden], [1 + ALPHA, -ALPHA]),
        "pmi": ([inputs.teacher_hidden, inputs.student_hidden.detach()], [1 + ALPHA, -ALPHA]),
    }[mixture]
    of_teacher = reference.mixture_log_probs(hidden, weights, [inputs.teacher_head] * len(hidden), 0.7)
    of_student = reference.linear_logits(inputs.student_hidden, inputs.student_head, 0.7).log_softmax(-1)
    divergence = reference.divergence_from_log_probs(of_student, of_teacher, 0.0)
    return reduce_per_token(divergence, inputs.cu_seqlens, "sequence").item()


@pytest.mark.parametrize("mixture", MIXTURES)
def test_alone_it_is_the_dense_mixture_of_distributions_and_scores_no_view(mixture):
    given = {"consensus": ["auxiliary"], "contrastive": ["negative"], "pmi": []}[mixture]
    with mock.patch("unisd_kernels.backends.engine.Engine.score", side_effect=AssertionError("a view was scored")):
        result = self_distillation_loss(
            tiny_run.llama(),
            **only(batches(), *given),
            teacher_mixture=mixture,
            mixture_alpha=ALPHA,
            agreement="none",
            contrastive_weight=0.0,
            temperature=0.7,
        )
    assert result.loss.item() == pytest.approx(dense_loss(mixture), rel=1e-5)


@pytest.mark.parametrize("mixture", ["self", *MIXTURES])
def test_beside_all_of_unisd_star_it_is_the_trainers(tmp_path, mixture):
    """Loss and gradient of an adapter away from zero; the dense step is a third opinion."""

    def adapted():
        model = get_peft_model(tiny_run.llama(), tiny_run.lora())
        tiny_run.perturb(model)
        return model

    overrides = {"preset": "unisd_star", "ema": "none", "agreement_gamma": 2.0, "contrastive_weight": 1.0}
    overrides |= {"feature_weight": 1.0, "teacher_mixture": mixture}
    overrides |= {"mixture_alpha": ALPHA} if mixture in ("contrastive", "pmi") else {}
    spy = tiny_run.Gradients()
    run = tiny_run.trainer(tmp_path, adapted(), **overrides)
    run.add_callback(spy)
    run.train()
    expected, dense = tiny_run.reference_step(adapted(), tiny_run.rows(), run.args)
    settings = {name: value for name, value in run.args.loss_settings().items() if name != "impl"}
    model = adapted()
    views = batches(run.args.num_auxiliary)
    result = self_distillation_loss(model, **views, teacher_mixture=mixture, mixture_alpha=ALPHA, **settings)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(tiny_run.losses(run)[0], rel=1e-5)
    assert result.loss.item() == pytest.approx(expected, rel=1e-5)
    tiny_run.assert_same_gradients(gradients_of(model), spy.steps[0])
    tiny_run.assert_same_gradients(gradients_of(model), dense)


def test_pmi_wants_one_head():
    """Another backbone under the same head will do."""
    model, teacher = tiny_run.llama(), tiny_run.llama(1)
    settings = {"teacher_model": teacher, "teacher_mixture": "pmi", "mixture_alpha": ALPHA, "temperature": 0.7}
    with pytest.raises(ValueError, match="needs one head, but teacher_model has another than model"):
        self_distillation_loss(model, **only(batches()), **settings)
    teacher.lm_head.weight = model.lm_head.weight
    result = self_distillation_loss(model, **only(batches()), **settings)
    assert result.loss.item() == pytest.approx(dense_loss("pmi", teacher), rel=1e-5)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_soft_cap_is_refused_before_a_pass(mixture):
    model = gemma2_with_a_soft_cap()
    with (
        mock.patch("unisd.loss.hidden_rows", side_effect=AssertionError("a pass was run")),
        pytest.raises(ValueError, match=rf"teacher_mixture='{mixture}' .* Gemma2ForCausalLM have a soft cap \(30\)"),
    ):
        self_distillation_loss(model, **batches(), teacher_mixture=mixture)


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        ([], {"teacher_mixture": "mean"}, "must be one of 'self', 'consensus', 'contrastive', 'pmi', got 'mean'"),
        ([], {"teacher_mixture": "pmi", "mixture_alpha": 0.0}, "mixture_alpha must be > 0, got 0.0"),
        ([], {"agreement": "row"}, "agreement must be one of 'none', 'token', 'sequence', got 'row'"),
        (["negative"], {"teacher_mixture": "consensus"}, "'consensus' reads auxiliary, which is not given"),
        (["auxiliary"], {"teacher_mixture": "contrastive"}, "'contrastive' reads negative, which is not given"),
        (["auxiliary"], {"teacher_mixture": "pmi", "agreement": "none"}, "auxiliary is given, but nothing reads it"),
    ],
)
def test_what_cannot_be_is_refused(names, settings, message):
    with pytest.raises(ValueError, match=message):
        self_distillation_loss(tiny_run.llama(), **only(batches(), *names), **settings)
