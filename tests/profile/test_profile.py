"""A profile adds up: its phases are the step, what is slow is seen, nothing is measured twice."""

from __future__ import annotations

import json
import time

import pytest
import torch

from tests.trainer import tiny_run
from unisd.profile.phases import PHASES, REST, StepProfile
from unisd.profile.report import summary, table


def test_an_inner_phase_is_taken_out_of_the_outer_one():
    profile = StepProfile(torch.device("cpu"))
    with profile.phase("rollout"):  # outside of a step: not measured
        time.sleep(0.01)
    profile.begin_step()
    with profile.phase("rollout"):
        time.sleep(0.02)
        with profile.phase("other views"):
            time.sleep(0.06)
    time.sleep(0.04)
    profile.end_step()
    (step,) = profile.steps
    assert 0.02 <= step["rollout"] < 0.05 < 0.06 <= step["other views"] < 0.1
    assert step[REST] >= 0.04
    rows = summary(profile)
    assert [row["phase"] for row in rows] == ["rollout", "other views", REST]
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)


def test_a_run_says_where_its_time_went(tmp_path, capsys):
    class Slow(tiny_run.FixedRollouts):
        """Rollouts take a tenth of a second."""

        def _generate_single_turn(self, *args, **kwargs):
            time.sleep(0.1)
            return super()._generate_single_turn(*args, **kwargs)

    run = tiny_run.trainer(tmp_path, cls=Slow, preset="unisd_star", max_steps=3, profile=True, sync_steps=1)
    run.train()
    written = json.loads((tmp_path / "profile.json").read_text())
    assert len(written["steps"]) == 3
    assert set(written["steps"][0]) == {*PHASES, REST}
    assert all(step["rollout"] >= 0.1 for step in written["steps"])
    assert all(step["backward"] > 0 and step["optimizer"] > 0 for step in written["steps"])
    assert (tmp_path / "profile.png").read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert "where a step's time goes" in out
    assert all(len(line) <= 80 for line in table(StepProfile(torch.device("cpu"), written["steps"])))


def test_profiling_changes_no_bit(tmp_path):
    losses = []
    for profile in (False, True):
        run = tiny_run.trainer(tmp_path / str(profile), preset="unisd_star", max_steps=2, profile=profile)
        run.train()
        losses.append(tiny_run.losses(run))
    assert losses[0] == losses[1]
