"""A NaN or an infinity: no optimizer step is made of it, the batch is saved, the cause is named."""

import math

import pytest
import torch

from tests.trainer import tiny_run
from unisd.batch import crop
from unisd.nonfinite import MAX_FILES, NonFiniteGuard

SETTINGS = {
    "preset": "unisd_star",
    "ema": "none",
    "ema_decay": None,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
}


class Poisoned(tiny_run.FixedRollouts):
    """From the second optimizer step on, one view of its second micro-batch ends in a NaN."""

    view = "prompt"  # the key whose ids are read
    value = math.nan
    steps = (1,)

    def _get_last_hidden_state(self, model, input_ids, attention_mask, logits_to_keep):
        hidden = super()._get_last_hidden_state(model, input_ids, attention_mask, logits_to_keep)
        if self.bad and input_ids.shape[1] == self.bad_ids.shape[1] and torch.equal(input_ids, self.bad_ids):
            hidden = hidden.clone()
            hidden[0, 0, 3] = self.value
        return hidden

    def _unisd_loss(self, student, inputs, num_items_in_batch):
        self.bad = self.state.global_step in self.steps and self._step % 2 == 1
        cropped = crop(inputs)
        ids = cropped[f"{self.view}_ids"]
        ids = ids[:, 1] if ids.dim() == 3 else ids
        self.bad_ids = torch.cat([ids, cropped["completion_ids"]], dim=1)
        return super()._unisd_loss(student, inputs, num_items_in_batch)


def poisoned(tmp_path, view="prompt", steps=(1,), value=math.nan, model=None, **overrides):
    cls = type("PoisonedView", (Poisoned,), {"view": view, "steps": steps, "value": value})
    # A pass a view: that is where the view is spoilt.
    return tiny_run.trainer(tmp_path, model, cls=cls, **{"view_passes": "padded", **SETTINGS, **overrides})


def weights(run) -> dict:
    return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


@pytest.fixture(scope="module")
def after_one_step(tmp_path_factory):
    run = tiny_run.trainer(tmp_path_factory.mktemp("one"), **{**SETTINGS, "max_steps": 1})
    run.train()
    return weights(run)


@pytest.mark.parametrize(
    ("view", "name"),
    [
        ("prompt", "the student"),
        ("teacher_prompt", "the teacher"),
        ("auxiliary_prompt", "auxiliary context 1"),
        ("negative_prompt", "the negative context"),
    ],
)
def test_a_bad_loss_stops_before_the_optimizer_step(tmp_path, after_one_step, view, name):
    run = poisoned(tmp_path, view)
    message = (
        rf"optimizer step 2 was not made: micro-batch 2 of 2: the loss is nan; not finite are .* {name} \(token 0, 1"
    )
    with pytest.raises(FloatingPointError, match=message):
        run.train()
    for key, weight in weights(run).items():
        assert torch.allclose(weight, after_one_step[key], rtol=0, atol=1e-6), key
    assert all(math.isfinite(loss) for loss in tiny_run.losses(run))
    assert len(tiny_run.losses(run)) == 1
    (path,) = (tmp_path / "nonfinite").iterdir()
    saved = torch.load(path)
    assert (path.name, saved["step"]) == ("step-2-process-0.pt", 2)
    (batch,) = saved["micro_batches"]
    for key in ("prompt", "completion", "teacher_prompt", "auxiliary_prompt", "negative_prompt"):
        assert {f"{key}_ids", f"{key}_mask"} <= batch["inputs"].keys()
    counted = int(batch["inputs"]["completion_mask"].sum())
    assert batch["statistics"]["divergence"].shape == (counted,)
    assert name in batch["cause"]


def test_an_infinite_loss_is_bad_too(tmp_path):
    with pytest.raises(FloatingPointError, match=r"micro-batch 2 of 2: the loss is (nan|inf)"):
        poisoned(tmp_path, value=math.inf).train()


def test_a_weight_is_named_before_what_it_spoils(tmp_path):
    run = poisoned(tmp_path, steps=())
    with torch.no_grad():
        run.model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(
        FloatingPointError, match=r"optimizer step 1 .*so is the weight model.layers.1.mlp.up_proj.weight"
    ):
        run.train()


class BadGradient(tiny_run.FixedRollouts):
    def training_step(self, *args):
        if self.state.global_step == 1:
            weight = self.model.model.layers[0].mlp.down_proj.weight
            handle = weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([1]), math.inf))
            try:
                return super().training_step(*args)
            finally:
                handle.remove()
        return super().training_step(*args)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_bad_gradient_of_a_finite_loss_stops_and_is_named(tmp_path, after_one_step, clip):
    run = tiny_run.trainer(tmp_path, cls=BadGradient, **SETTINGS, max_grad_norm=clip)
    with pytest.raises(
        FloatingPointError, match=r"not the gradient of model.layers.0.mlp.down_proj.weight\. Its batch"
    ):
        run.train()
    assert run.state.global_step == 1
    assert all(torch.isfinite(weight).all() for weight in weights(run).values())
    if clip == 0.0:
        for key, weight in weights(run).items():
            assert torch.allclose(weight, after_one_step[key], rtol=0, atol=1e-6), key
    (path,) = (tmp_path / "nonfinite").iterdir()
    assert len(torch.load(path)["micro_batches"]) == 2


class Weights(tiny_run.TrainerCallback):
    def __init__(self):
        self.by_step = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.by_step[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_skipping_leaves_out_the_step_and_its_loss(tmp_path, logging_steps):
    run = poisoned(tmp_path, on_nonfinite="skip", optim="adamw_torch", logging_steps=logging_steps, steps=(1,))
    seen = Weights()
    run.add_callback(seen)
    with pytest.warns(UserWarning, match="the UniSD loss was NaN or infinite"):
        run.train()
    one, two, three = (seen.by_step[step] for step in (1, 2, 3))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(two[name], three[name]) for name in two)
    losses = tiny_run.losses(run)
    good = poisoned(tmp_path / "good", steps=(), optim="adamw_torch", max_steps=1)
    good.train()
    if logging_steps == 1:
        assert math.isnan(losses[1])
        assert losses[0] == pytest.approx(tiny_run.losses(good)[0], rel=1e-5)
        assert math.isfinite(losses[2])
        assert tiny_run.logged(run, "unisd/skipped_steps") == [1]
    else:
        # The mean of the two steps that were made, not of three, and not 0.
        (loss,) = losses
        whole = poisoned(tmp_path / "each", steps=(1,), on_nonfinite="skip", optim="adamw_torch")
        whole.train()
        made = [value for value in tiny_run.losses(whole) if math.isfinite(value)]
        assert loss == pytest.approx(sum(made) / 2, rel=1e-4)
    assert len(list((tmp_path / "nonfinite").iterdir())) == 1


def test_skipping_does_not_go_on_with_a_bad_weight(tmp_path):
    run = poisoned(tmp_path, steps=(), on_nonfinite="skip")
    with torch.no_grad():
        run.model.lm_head.weight[5, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"so is the weight lm_head\.weight"):
        run.train()


def guard(tmp_path, mode="stop", any_process=bool, scales_loss=False) -> NonFiniteGuard:
    return NonFiniteGuard(mode, tmp_path, 0, any_process, scales_loss)


def parameter(gradient: float):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.tensor([1.0, gradient, 0.0])
    return [("w", weight), ("empty", torch.nn.Parameter(torch.ones(0)))]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_overflow_under_loss_scaling_is_the_scalers_business(tmp_path, bad):
    assert guard(tmp_path, scales_loss=True).step(parameter(bad), 0) is False
    with pytest.raises(FloatingPointError, match="not the gradient of w"):
        guard(tmp_path).step(parameter(bad), 0)
    assert guard(tmp_path).step(parameter(1e30), 0) is False


def test_with_a_scaler_a_skipped_step_is_one_it_skips(tmp_path):
    watching = guard(tmp_path, mode="skip", scales_loss=True)
    watching.loss(torch.tensor(math.nan), {}, {}, {}, [])
    named = parameter(1.0)
    assert watching.step(named, 0) is True
    assert torch.isinf(named[0][1].grad).all()


def test_all_processes_stop_together(tmp_path):
    with pytest.raises(FloatingPointError, match="another process met a value"):
        guard(tmp_path, any_process=lambda condition: True).step(parameter(1.0), 4)
    assert not (tmp_path / "nonfinite").exists()


def test_the_number_of_saved_batches_is_bounded(tmp_path):
    watching = guard(tmp_path, mode="skip")
    for step in range(MAX_FILES + 3):
        watching.loss(torch.tensor(math.nan), {}, {}, {}, [])
        assert watching.step(parameter(1.0), step) is True
    assert len(list((tmp_path / "nonfinite").iterdir())) == MAX_FILES
    assert watching.take_counts() == (MAX_FILES + 3, MAX_FILES + 3)
    assert watching.take_counts() == (0, 0)
