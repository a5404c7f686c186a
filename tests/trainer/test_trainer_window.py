"""`batch_statistics="global"`: the gradient of a step does not depend on how it is cut into micro-batches."""

from types import SimpleNamespace

import pytest
import torch

from tests.trainer import tiny_run
from unisd.batch import CLIP_CAP
from unisd.parallelism import check_parallelism

EXHAUSTIVE = pytest.mark.exhaustive
STEP = {"agreement_gamma": 2.0, "batch_statistics": "global"}
BY_TOKEN = {"normalization": "token", "weight_normalization": "weighted"}
SETTINGS = {
    "token": {"preset": "unisd_star", "clip_quantile": 0.6},
    "by token": {"preset": "agreement_token", **BY_TOKEN, "skip_first_tokens": 2},
    "sequence": {"preset": "agreement_sequence", **BY_TOKEN, "clip_quantile": 0.5},
    "consensus": {"preset": "agreement_token", "teacher_mixture": "consensus", "clip_quantile": 0.5},
    "contrastive": {"preset": "plain", "teacher_mixture": "contrastive", "clip_quantile": 0.5},
    "pmi": {"preset": "plain", "teacher_mixture": "pmi", "clip_quantile": 0.5},
    "selective": {"preset": "unisd_star", "clip_quantile": 0.6, "agreement_fraction": 0.5},
}


def step(tmp_path, micro_batch, model=None, cls=tiny_run.FixedRollouts, **settings):
    """The run of one step, its loss and its gradients."""
    gradients = tiny_run.Gradients()
    given = {"gradient_accumulation_steps": tiny_run.NUM_ROWS // micro_batch, **STEP, **settings}
    run = tiny_run.trainer(tmp_path, model, cls=cls, per_device_train_batch_size=micro_batch, **given)
    run.add_callback(gradients)
    run.train()
    return run, tiny_run.losses(run)[0], gradients.steps[0]


def double():
    return tiny_run.llama().double()


EVERY_SETTING = [name if name in ("token", "by token") else pytest.param(name, marks=EXHAUSTIVE) for name in SETTINGS]


@tiny_run.with_the_newest_trl
@pytest.mark.parametrize("name", EVERY_SETTING)
def test_however_the_step_is_cut(tmp_path, name):
    """4 x 1, 2 x 2 and 1 x 4 in float64; 1 x 4 is what the micro-batch's own quantities give."""
    settings = SETTINGS[name]
    whole, loss, expected = step(tmp_path, 4, double(), **settings, batch_statistics="micro")
    # The cap is 64 units in the last place larger.
    for micro_batch in (4, 2, 1):
        run, found, gradients = step(tmp_path, micro_batch, double(), **settings)
        assert found == pytest.approx(loss, rel=1e-6)  # as it is logged
        tiny_run.assert_same_gradients(gradients, expected, 1e-11)
        for metric in ("agreement_weight", "agreement_weight_min", "disagreement", "clipped_share", "auxiliary_share"):
            one, other = (tiny_run.logged(each, f"unisd/{metric}") for each in (run, whole))
            assert one == pytest.approx(other, rel=1e-5), metric
    _, _, gradients = step(tmp_path, 1, double(), **settings, batch_statistics="micro")
    with pytest.raises(AssertionError, match="relative error"):
        tiny_run.assert_same_gradients(gradients, expected, 1e-3)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_float32_against_the_dense_definition(tmp_path, micro_batch):
    """The quantile is one of the divergences here, whose token must keep its gradient."""
    items = tiny_run.rows()
    num_tokens = sum(len(tiny_run.completion_of(tiny_run.tokenized(item["prompt"]))) for item in items)
    settings = {"preset": "unisd_star", "clip_quantile": 5 / (num_tokens - 1)}
    args = tiny_run.config(tmp_path, **STEP, **settings)
    expected_loss, expected = tiny_run.reference_step(tiny_run.llama(), items, args)
    _, loss, gradients = step(tmp_path, micro_batch, **settings)
    assert loss == pytest.approx(expected_loss, rel=2e-5)
    tiny_run.assert_same_gradients(gradients, expected)


def passes(tmp_path, **settings):
    """Sequences in each pass of the backbone, of one step of four micro-batches, and what the student's were."""
    model, read = tiny_run.llama(), []

    def count(module, args, kwargs):
        read.append((kwargs["input_ids"].shape[0], torch.is_grad_enabled()))

    class Counted(tiny_run.FixedRollouts):
        def train(self, *args, **kwargs):
            read.clear()
            return super().train(*args, **kwargs)

    model.model.register_forward_pre_hook(count, with_kwargs=True)
    step(tmp_path, 1, model, cls=Counted, view_passes="padded", **settings)
    assert {size for size, _ in read} == {1}
    return sum(not grad for _, grad in read), sum(grad for _, grad in read)


@tiny_run.with_the_newest_trl
@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({"preset": "agreement_token"}, 0),
        ({"preset": "unisd_star", "clip_quantile": 0.5}, 1),  # the student's
        # and the negative's, and three auxiliary views'
        pytest.param({"preset": "plain", "clip_quantile": 0.5, "teacher_mixture": "contrastive"}, 2, marks=EXHAUSTIVE),
        pytest.param({"preset": "plain", "clip_quantile": 0.5, "teacher_mixture": "consensus"}, 4, marks=EXHAUSTIVE),
        pytest.param({"preset": "agreement_token", "teacher_mixture": "consensus"}, 3, marks=EXHAUSTIVE),
    ],
)
def test_passes(tmp_path, settings, more):
    """As docs/training.md has them, for each of four sequences."""
    before = passes(tmp_path, **settings, batch_statistics="micro")
    after = passes(tmp_path, **settings)
    assert after == (before[0] + 4 * more, before[1])


@tiny_run.with_the_newest_trl
def test_the_cap_is_of_the_student_without_dropout(tmp_path):
    caps = []
    for dropout in (0.0, 0.5):
        model = tiny_run.llama(attention_dropout=dropout)
        run, *_ = step(tmp_path, 1, model, preset="agreement_token", clip_quantile=0.5)
        caps += [batch[CLIP_CAP] for batch in run._buffered_inputs]
    assert len(caps) == 8
    assert torch.stack(caps).unique().numel() == 1


@tiny_run.with_the_newest_trl
def test_a_step_without_a_token(tmp_path):
    with pytest.warns(UserWarning, match="no rows"):
        _, loss, gradients = step(tmp_path, 2, preset="unisd_star", clip_quantile=0.5, skip_first_tokens=9)
    assert loss == 0.0
    assert all(not gradient.any() for gradient in gradients.values())


class BadTeacher(tiny_run.FixedRollouts):
    """The teacher's first hidden state of the step is NaN."""

    bad = True

    def _get_last_hidden_state(self, *args):
        hidden = super()._get_last_hidden_state(*args)
        if torch.is_grad_enabled() or not self.bad:
            return hidden
        self.bad = False
        return hidden.index_fill(0, torch.tensor([0]), torch.nan)


def test_what_is_not_finite_is_named(tmp_path):
    """A cap that is no number clips nothing; the micro-batch whose divergence it comes from has the loss NaN."""
    settings = {"preset": "plain", "clip_quantile": 0.5, "view_passes": "padded"}
    with pytest.raises(FloatingPointError, match=r"hidden states of: the teacher \(token 0"):
        step(tmp_path, 1, cls=BadTeacher, **settings)


@tiny_run.with_the_newest_trl
def test_an_evaluation_batch_is_a_window(tmp_path):
    settings = {"preset": "unisd_star", "clip_quantile": 0.5, "agreement_gamma": 2.0, "normalization": "token"}
    losses = []
    for which in ("micro", "global"):
        run = tiny_run.trainer(tmp_path, **settings, batch_statistics=which)
        losses.append(run.evaluate(tiny_run.dataset())["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_statistics": "step"}, "batch_statistics must be one of 'micro', 'global', got 'step'"),
        ({"top_entropy_quantile": 0.5, "preset": "agreement_token"}, "top_entropy_quantile=0.5 chooses tokens in each"),
        ({"preset": "sft"}, "batch_statistics='global' has no effect with preset='sft'"),
    ],
)
def test_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_run.config(tmp_path, **{"batch_statistics": "global", **settings})


def test_without_effect(tmp_path):
    with pytest.warns(UserWarning, match="batch_statistics='global' has no effect with agreement='sequence'"):
        args = tiny_run.config(tmp_path, preset="agreement_sequence", batch_statistics="global")
    assert not args.uses_global_statistics


def test_copies_of_rows_are_refused(tmp_path):
    args = tiny_run.config(tmp_path, preset="agreement_token", batch_statistics="global")
    check_parallelism(args, SimpleNamespace(parallelism_config=SimpleNamespace(non_data_parallel_size=1)))
    with pytest.raises(ValueError, match="but 2 processes share each"):
        check_parallelism(args, SimpleNamespace(parallelism_config=SimpleNamespace(non_data_parallel_size=2)))
