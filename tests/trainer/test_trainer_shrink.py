"""A budget for the drift with LoRA: what was learned is shrunk back under it, and training goes on."""

import math

import pytest
import torch
from peft import LoraConfig
from torch import nn

from tests.trainer import tiny_run
from unisd.drift.budget import DriftBudget
from unisd.drift.shrink import can_shrink, shrink

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
RUN = {"preset": "plain", "max_steps": 16, "drift_probe": tiny_run.PROBE, "drift_probe_every": 4, "learning_rate": 0.1}
KL, SCALE, SHRUNK = "unisd/drift_kl", "unisd/drift_lr_scale", "unisd/drift_shrunk"


class Adapted(nn.Module):
    """One layer of LoRA by name, whose B is 1 everywhere."""

    def __init__(self):
        super().__init__()
        factors = {"lora_A": nn.Linear(2, 2, bias=False), "lora_B": nn.Linear(2, 2, bias=False)}
        self.layer = nn.ModuleDict({name: nn.ModuleDict({"default": factor}) for name, factor in factors.items()})
        nn.init.ones_(self.b)

    @property
    def b(self):
        return self.layer["lora_B"]["default"].weight


@pytest.mark.parametrize(
    "drift_at",
    [
        lambda s: 4 * s * s,
        lambda s: math.expm1(6 * s),
        lambda s: math.inf if s > 0.5 else s * s,
        lambda s: 0.5 * s**8,
        lambda s: 0.11 if s > 0.02 else s * s,
    ],
    ids=["quadratic", "steep", "infinite", "flat", "leap"],
)
def test_the_largest_change_under_the_bound_is_found(drift_at):
    model = Adapted()
    whole_a = model.layer["lora_A"]["default"].weight.detach().clone()
    factor, drift = shrink(model, lambda m: drift_at(float(m.b[0, 0])), 0.6, 0.1)
    assert torch.equal(model.b, torch.full((2, 2), factor))
    assert torch.equal(model.layer["lora_A"]["default"].weight, whole_a)
    assert drift == pytest.approx(drift_at(factor), rel=1e-5)
    assert drift < 0.1
    # The leap passes over the range that is aimed at, too near the base to be found.
    assert drift >= 0.085 or drift_at(0.2001) == 0.11


def test_what_is_not_lora_alone_is_not_shrunk(tmp_path):
    model = Adapted()
    assert can_shrink(model)
    model.bias = nn.Parameter(torch.zeros(1))
    assert not can_shrink(model)
    model.requires_grad_(False)
    assert not can_shrink(model)
    assert not can_shrink(tiny_run.trainer(tmp_path, **RUN).model)


def test_what_may_be_put_back_goes_on():
    """Each interval goes as far as the one before at the same scale; the other law would come to rest."""
    control = DriftBudget(0.1, can_shrink=True)
    distance, scales = 0.0, []
    for step in range(4, 80, 4):
        distance += 4 * 0.05 * control.scale
        left_at = 0.0925 if distance**2 >= 0.1 else None
        control.update(step, distance**2, 4, left_at)
        distance = distance if left_at is None else math.sqrt(left_at)
        scales.append(control.scale)
    assert not control.is_used_up
    assert min(scales) == pytest.approx(math.sqrt(0.1) / 2 / 0.2)


def test_a_first_step_that_was_too_large_does_not_slow_all_others():
    """Steps before the next measurement: 1, 2, 4, 4."""
    control = DriftBudget(0.02, can_shrink=True)
    control.update(1, 0.25, 1, left_at=0.0185)
    first = control.scale
    assert first == pytest.approx(math.sqrt(0.02) / 2 / 0.5)
    for step, following in ((2, 2), (4, 4), (8, 4)):
        control.update(step, 0.014, following)
    assert control.scale == pytest.approx(2 * first)


def test_a_lora_run_ends_at_its_budget(tmp_path, caplog):
    free = tiny_run.trainer(tmp_path / "free", peft_config=LORA, **RUN)
    free.train()
    assert tiny_run.logged(free, KL)[-1] > 0.04
    run = tiny_run.trainer(tmp_path / "kept", peft_config=LORA, drift_budget=0.02, **RUN)
    run.train()
    drifts = tiny_run.logged(run, KL)
    assert run.state.global_step == RUN["max_steps"]
    assert 0.016 <= drifts[-1] <= max(drifts) < 0.02
    assert len(tiny_run.logged(run, SHRUNK)) > 1
    assert all(0 < factor < 1 for factor in tiny_run.logged(run, SHRUNK))
    assert run.run_on_student(run.drift.measure) == pytest.approx(drifts[-1], rel=1e-3)
    assert caplog.text.count("what was learned is shrunk to") == 1
    # Training goes on at the bound.
    assert min(tiny_run.logged(run, SCALE)[-2:]) > 0.05
