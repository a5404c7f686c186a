"""The budget for the drift: the control by itself, in a run that leaves every bound without it, and after a kill."""

import math

import pytest
import torch
from transformers import TrainerCallback

from tests.trainer import tiny_run
from unisd.drift.budget import DriftBudget
from unisd.drift.schedule import DriftSchedule

RUN = {"preset": "plain", "max_steps": 24, "drift_probe": tiny_run.PROBE, "drift_probe_every": 4, "learning_rate": 0.02}
KL, SCALE = "unisd/drift_kl", "unisd/drift_lr_scale"


def simulated(budget, rate, steps=400, every=10, wobble=0.0):
    """Drifts of a model whose distance from its base grows by `rate` times the scale, which is what sqrt(KL) is."""
    control, distance, drifts = DriftBudget(budget), 0.0, []
    for step in range(1, steps + 1):
        distance += rate * control.scale * (1 + wobble * math.sin(7 * step))
        if step % every == 0 or (step < every and step & (step - 1) == 0):
            drifts.append(distance**2)
            control.update(step, distance**2, min(step, every - step) if step < every else every)
    return control, drifts


@pytest.mark.parametrize("rate", [1e-3, 5e-3, 0.05, 0.2])
@pytest.mark.parametrize("wobble", [0.0, 0.5])
def test_the_budget_is_approached_and_not_passed(rate, wobble):
    control, drifts = simulated(0.1, rate, wobble=wobble)
    assert not control.is_used_up
    assert max(drifts) < 0.1
    if rate * 400 > math.sqrt(0.1):
        assert drifts[-1] > 0.08


def test_far_from_the_budget_nothing_is_scaled():
    control, _ = simulated(10.0, 1e-3)
    assert control.scale == 1.0


def test_a_budget_that_the_first_step_passes_ends_the_run():
    control, _ = simulated(1e-4, 1.0, steps=1)
    assert control.is_used_up
    assert control.scale == 0.0


def test_a_drift_that_is_no_number_ends_the_run():
    control = DriftBudget(0.1)
    control.update(1, math.nan, 1)
    assert control.is_used_up


def test_the_scale_rises_again_where_the_drift_falls():
    control = DriftBudget(0.1)
    control.update(10, 0.08, 10)
    low = control.scale
    control.update(20, 0.02, 10)
    assert low < control.scale <= 2 * low


def test_a_run_stays_within_its_budget(tmp_path, caplog):
    free = tiny_run.trainer(tmp_path / "free", **RUN)
    free.train()
    assert max(tiny_run.logged(free, KL)) > 0.06
    run = tiny_run.trainer(tmp_path / "kept", drift_budget=0.02, **RUN)
    run.train()
    drifts = tiny_run.logged(run, KL)
    assert 0.008 < drifts[-1] <= max(drifts) < 0.02
    assert run.state.global_step == RUN["max_steps"]
    scales = tiny_run.logged(run, SCALE)
    assert min(scales) < 0.5
    # The schedule's own rate is what is logged, and what later steps go on from.
    rates = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    assert set(rates) == {RUN["learning_rate"]}
    assert [record.message for record in caplog.records if "of a budget of 0.02 nats" in record.message]


def test_a_budget_that_is_not_reached_changes_nothing(tmp_path):
    weights = []
    for budget in (None, 1e3):
        run = tiny_run.trainer(tmp_path, drift_budget=budget, **{**RUN, "max_steps": 6})
        run.train()
        weights.append([parameter.detach() for parameter in run.model.parameters()])
    assert all((a == b).all() for a, b in zip(*weights, strict=True))


def test_the_rate_comes_back_after_each_step(tmp_path):
    """Not every scheduler sets it anew."""
    run = tiny_run.trainer(tmp_path, drift_budget=0.1, **RUN)
    (schedule,) = (each for each in run.callback_handler.callbacks if isinstance(each, DriftSchedule))
    schedule._budget.scale = 0.25
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 0.8}, {"params": [torch.zeros(1)], "lr": 0.4}])
    for _ in range(2):
        schedule.on_pre_optimizer_step(run.args, run.state, run.control, optimizer=optimizer)
        assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]
        schedule.on_optimizer_step(run.args, run.state, run.control, optimizer=optimizer)
        assert [group["lr"] for group in optimizer.param_groups] == [0.8, 0.4]


def test_a_used_up_budget_stops_the_run(tmp_path, caplog):
    run = tiny_run.trainer(tmp_path, drift_budget=1e-5, **RUN)
    run.train()
    assert run.state.global_step == 1
    assert "training stops" in caplog.text


class Interruption(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_resumed_run_is_as_one_that_was_not_interrupted(tmp_path):
    settings = {**RUN, "drift_budget": 0.02, "save_strategy": "steps", "save_steps": 8, "max_steps": 20}
    whole = tiny_run.trainer(tmp_path / "whole", **settings)
    whole.train()
    part = tiny_run.trainer(tmp_path / "part", **settings)
    part.add_callback(Interruption(10))
    with pytest.raises(KeyboardInterrupt):
        part.train()
    again = tiny_run.trainer(tmp_path / "part", **settings)
    again.train(resume_from_checkpoint=True)
    assert tiny_run.losses(again) == tiny_run.losses(whole)
    assert tiny_run.logged(again, SCALE) == tiny_run.logged(whole, SCALE)
    assert all((a == b).all() for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drift_budget": 0.0}, "drift_budget must be > 0, got 0.0"),
        ({"drift_budget": 0.1, "drift_probe_every": 0}, "drift_budget=0.1 needs the drift measured"),
    ],
)
def test_mistakes_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_run.config(tmp_path, **settings)
