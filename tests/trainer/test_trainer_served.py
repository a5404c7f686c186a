"""Auxiliary views scored by a server: the same step as with local scoring, less passes, and what may go wrong."""

from __future__ import annotations

import threading

import pytest
import torch

from tests import fake_server
from tests.trainer import tiny_run
from unisd.views import served_scorer

BASE = {"teacher": "base", "ema": "none", "agreement_gamma": 2.0, "max_prompt_length": 64}

# Of the step's two micro-batches, with a quarter of the sequences scored, one has none to score.
GLOBAL = {"batch_statistics": "global", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
BY_TOKEN = {"normalization": "token", "weight_normalization": "weighted"}


@pytest.fixture
def server(monkeypatch):
    """A server of the base model: `tiny_run.llama()` with another copy of the weights."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("unisd.server._FIRST_WAIT", 0.01)
    monkeypatch.setattr("unisd.server._AT_FIRST", 0.05)
    with fake_server.running(tiny_run.llama()) as server:
        yield server


def served(server, **overrides):
    return {"view_scorer": "server", "view_scorer_url": server.url, **overrides}


def step(tmp_path, model=None, **overrides):
    gradients = tiny_run.Gradients()
    run = tiny_run.trainer(tmp_path, model, **{**BASE, **overrides})
    run.add_callback(gradients)
    run.train()
    return run, gradients.steps


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("unisd_star", {}),
        ("agreement_token", {"top_entropy_quantile": 0.6, "normalization": "token"}),
        ("agreement_sequence", {"agreement_fraction": 0.5}),
        ("agreement_sequence", {"top_entropy_quantile": 0.6, "skip_first_tokens": 1, "peft_config": "lora"}),
        ("unisd_star", {**GLOBAL, "clip_quantile": 0.5}),
        ("agreement_token", {**GLOBAL, **BY_TOKEN, "agreement_fraction": 0.25}),
    ],
)
def test_a_server_gives_what_the_model_here_gives(tmp_path, server, preset, overrides):
    """Two steps, so that student and base differ in the second."""
    overrides = {**overrides, "max_steps": 2, "preset": preset}
    if "peft_config" in overrides:
        overrides["peft_config"] = tiny_run.lora()
    local, expected = step(tmp_path / "local", **overrides)
    run, gradients = step(tmp_path / "served", **overrides, **served(server))
    for of_served, of_local in zip(gradients, expected, strict=True):
        tiny_run.assert_same_gradients(of_served, of_local)
    for name in ("loss", "unisd/agreement_weight", "unisd/disagreement", "unisd/auxiliary_share"):
        assert tiny_run.logged(run, name) == pytest.approx(tiny_run.logged(local, name), rel=1e-4)
    assert min(tiny_run.logged(run, "unisd/agreement_weight_min")) < 0.9  # the weights matter here
    # Once for each scored sequence and context of both steps; and those of the comparison.
    scored = 2 * 3 * tiny_run.NUM_ROWS * run.args.agreement_fraction
    assert run.step.served.requests == scored + run.args.per_device_train_batch_size


def test_the_auxiliary_contexts_are_read_there(tmp_path, server):
    model = tiny_run.llama()
    read = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    run, _ = step(tmp_path, model, preset="unisd_star", view_passes="padded", max_steps=2, **served(server))
    # Per step teacher, negative and student; one auxiliary context in the first, to compare.
    assert [count for count in read if count > 1] == [4, 4, 4, 4, 4, 4, 4]
    assert run.step.served.requests == 4 * (3 + 3 + 1) == len(server.bodies)
    assert 1 < server.most_under_way <= 16
    bodies = [body for _, _, body in server.bodies]
    assert all(body["temperature"] == 1.0 and body["prompt_logprobs"] == 0 for body in bodies)
    assert all(isinstance(token, int) for body in bodies for token in body["prompt"])


def test_a_restart_in_the_middle_is_survived(tmp_path, server, caplog):
    _, expected = step(tmp_path / "local", preset="agreement_token", max_steps=3)
    score, back = server.score, threading.Timer(0.3, server.start)

    def goes_down(body):
        with server.lock:
            if len(server.bodies) < 20 or server.score is score:
                return score(body)
            server.score = score  # in the second step
        server.stop()
        back.start()
        return None  # with a request under way

    server.score = goes_down
    _, gradients = step(tmp_path / "served", preset="agreement_token", max_steps=3, **served(server))
    back.join()
    for of_served, of_local in zip(gradients, expected, strict=True):
        tiny_run.assert_same_gradients(of_served, of_local)
    assert any("trying again for 600 s" in message for message in caplog.messages)
    assert "answers again" in caplog.messages[-1]


@pytest.mark.parametrize("is_sharded", [False, True])
def test_other_weights_after_a_restart_are_noticed(tmp_path, server, is_sharded):
    """In the step after; not with sharded weights, of which one process alone cannot make a pass."""
    run = tiny_run.trainer(
        tmp_path, **BASE, preset="agreement_token", max_steps=3, **served(server, view_scorer_patience=5.0)
    )
    run.step.is_sharded = is_sharded
    score, other = server.score, fake_server.scores_of(tiny_run.llama(seed=1), threading.Lock())

    def goes_down(body):
        with server.lock:
            if len(server.bodies) < 20:
                return score(body)
            server.score = other  # in the second step
        return None

    server.score = goes_down
    if is_sharded:
        run.train()
        assert run.state.global_step == 3
        return
    with pytest.raises(ValueError, match=r"scores 'tiny' .* nats a token apart from the base model here"):
        run.train()
    assert run.state.global_step == 2


def test_a_server_that_stays_away_ends_the_run(tmp_path, server):
    run = tiny_run.trainer(tmp_path, **BASE, preset="agreement_token", **served(server, view_scorer_patience=0.1))
    server.stop()
    with pytest.raises(ValueError, match=r"completions: does not answer .* is the server up\?"):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.parametrize(("seed", "scale", "overrides"), [(1, 1.0, {}), (0, 1 / 0.7, {}), (1, 1.0, GLOBAL)])
def test_another_model_or_temperature_is_refused_before_a_step(tmp_path, monkeypatch, seed, scale, overrides):
    monkeypatch.setenv("no_proxy", "*")
    with fake_server.running(tiny_run.llama(seed), scale) as server:
        run = tiny_run.trainer(tmp_path, **BASE, preset="agreement_token", **served(server, **overrides))
        with pytest.raises(ValueError, match=r"scores 'tiny' .* nats a token apart from the base model here"):
            run.train()
        assert run.state.global_step == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda choice: {"text": ""}, "answered without prompt_logprobs"),
        (lambda choice: {**choice, "prompt_logprobs": choice["prompt_logprobs"][1:]}, "it cuts or adds tokens"),
        (
            lambda choice: {**choice, "prompt_logprobs": [None] + [{"63": {"logprob": -1.0}}] * 99},
            "it cuts or adds tokens|scored other tokens than it was given",
        ),
    ],
)
def test_answers_that_do_not_fit_are_refused(tmp_path, server, change, said):
    score = server.score
    server.score = lambda body: change(score(body))
    run = tiny_run.trainer(tmp_path, **BASE, preset="agreement_token", **served(server))
    with pytest.raises(ValueError, match=said):
        run.train()


def test_other_tokens_than_were_sent_are_refused(tmp_path, server):
    score = server.score

    def renamed(body):
        choice = score(body)
        return {"prompt_logprobs": [None, *({"-1": {"logprob": -1.0}} for _ in choice["prompt_logprobs"][1:])]}

    server.score = renamed
    run = tiny_run.trainer(tmp_path, **BASE, preset="agreement_token", **served(server))
    with pytest.raises(ValueError, match="scored other tokens than it was given"):
        run.train()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"view_scorer_url": None}, "needs view_scorer_url"),
        ({"view_scorer_url": "localhost:8000"}, "needs view_scorer_url.*got 'localhost:8000'"),
        ({"teacher": "self"}, "the teacher is 'self' with ema='none': set teacher='base'"),
        ({"teacher": "self", "ema": "full"}, "the teacher is 'self' with ema='full'"),
        ({"preset": "sdft", "ema": "none"}, "agreement='none'"),
        ({"teacher_mixture": "consensus"}, "needs the hidden states"),
        ({"view_scorer": "elsewhere"}, "view_scorer must be one of"),
        ({"view_scorer": "local"}, "view_scorer_url=.* has no effect without view_scorer='server'"),
        ({"view_scorer_concurrency": 0}, "view_scorer_concurrency must be >= 1"),
        ({"view_scorer_timeout": 0.0}, "view_scorer_timeout must be"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, overrides, said):
    settings = {"preset": "unisd_star", "view_scorer": "server", "view_scorer_url": "http://h:1", **BASE}
    with pytest.raises(ValueError, match=said):
        tiny_run.config(tmp_path, **{**settings, **overrides})


def test_no_process_is_more_patient_than_the_others_wait(tmp_path, server):
    settings = {**BASE, "preset": "agreement_token", **served(server, view_scorer_patience=30.0)}
    args = tiny_run.config(tmp_path, ddp_timeout=30, **settings)
    with pytest.raises(ValueError, match=r"view_scorer_patience=30 is not below ddp_timeout=30.* raise ddp_timeout"):
        served_scorer(args, num_processes=2)
    assert served_scorer(args) is not None
    assert served_scorer(tiny_run.config(tmp_path, ddp_timeout=31, **settings), num_processes=2) is not None


def test_what_the_server_does_not_have_is_told_at_construction(tmp_path, server):
    def build(**overrides):
        settings = {**BASE, "preset": "agreement_token", **served(server)}
        return tiny_run.trainer(tmp_path, **{**settings, **overrides})

    with pytest.raises(ValueError, match=r"view_scorer_model='other' is none of the models .*: tiny"):
        build(view_scorer_model="other")
    server.longest = 70
    with pytest.raises(ValueError, match=r"takes 70 tokens .* less than .* = 71: start it with --max-model-len"):
        build()
    with pytest.raises(ValueError, match=r"127.0.0.1:9/v1/models: does not answer"):
        build(view_scorer_url="http://127.0.0.1:9")
    server.longest = 71
    assert torch.is_tensor(next(build().model.parameters()))
