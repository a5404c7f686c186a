"""The reliability tax: every peer does the same work, dense is the same mathematics, a failure is a row."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.studies import step_runs, steps
from bench.studies.step_runs import DENSE, OURS, PEERS, VARIANTS, make_workbench
from unisd_kernels import LMHead
from unisd_kernels.config import LossConfig

CPU = torch.device("cpu")
NEW_TOKENS = 5
FIGURES = {
    "median_seconds",
    "p20_seconds",
    "p80_seconds",
    "tokens_per_second",
    "ratio_to_plain",
    "samples_seconds",
    "joules",
    "joules_measured",
    "joules_how",
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = make_workbench("tiny", CPU, 4, NEW_TOKENS, str(tmp_path_factory.mktemp("steps")))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:  # zero at first, which would leave lora_A without a gradient
                parameter.normal_(std=0.1, generator=generator)
    return made


@pytest.fixture(scope="module")
def completions(bench):
    torch.manual_seed(0)
    return bench.trainer("plain", OURS).rollout(bench.rows)


# Each term of the loss, both teachers, both kinds of agreement.
KEPT = ("plain", "agreement_sequence", "match_repr", "unisd_star", "gkd", "unisd_star-q0.25")


def measured(variants):
    return steps.measure("tiny", CPU, 1, list(variants), batch_size=4, new_tokens=NEW_TOKENS, with_memory=False)


@pytest.fixture(scope="module")
def rows():
    return measured(KEPT[:4])


def test_a_rollout_is_a_fixed_number_of_tokens(completions):
    assert [len(completion) for completion in completions] == [NEW_TOKENS] * 4
    assert len({tuple(completion) for completion in completions}) > 1


def batch_and_gradients(bench, completions, variant, peer):
    """What the trainer fed to the loss (completion by prompt), the loss, and the gradients."""
    trainer = bench.trainer(variant, peer, completions)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(trainer.model, bench.rows, None)
    batch = trainer._buffered_inputs[0]
    fed = dict(zip(map(tuple, batch["prompt_ids"].tolist()), batch["completion_ids"].tolist(), strict=True))
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return fed, loss, gradients


@pytest.mark.parametrize(
    "variant", [name if name in KEPT else pytest.param(name, marks=pytest.mark.exhaustive) for name in VARIANTS]
)
def test_peers_train_the_same_tokens_with_the_same_loss(bench, completions, variant):
    ours, dense = (batch_and_gradients(bench, completions, variant, peer) for peer in PEERS)
    assert ours[0] == dense[0]
    assert sorted(ours[0].values()) == sorted(completions)
    torch.testing.assert_close(ours[1], dense[1], rtol=1e-5, atol=1e-6)
    assert ours[1] > 1e-3
    assert ours[2].keys() == dense[2].keys()
    for name, gradient in dense[2].items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(ours[2][name], gradient, rtol=0, atol=1e-4 * scale, msg=name)


def test_dense_runs_none_of_our_kernels(bench, completions, monkeypatch):
    trainers = {peer: bench.trainer("contrastive", peer, completions) for peer in PEERS}
    monkeypatch.setenv("UNISD_IMPL", "nonesuch")
    with pytest.raises(ValueError, match="nonesuch"):
        trainers[OURS].optimizer_step(bench.rows)
    trainers[DENSE].optimizer_step(bench.rows)


@pytest.mark.parametrize(("num_views", "weight"), [(0, 1.0), (3, 1.0), (0, 0.0)])
def test_dense_makes_each_product_once(num_views, weight):
    """K scorings, negative, student, teacher, and the gradient to the student's hidden states."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(num_views + 3, 6, 4, generator=generator)
    student = draw[0].requires_grad_()
    spec = LossConfig(divergence_weight=weight, feature_weight=1.0)
    with FlopCounterMode(display=False) as counter:
        step_runs.dense_unisd_loss(
            student,
            LMHead(torch.randn(10, 4, generator=generator)),
            draw[1],
            LMHead(torch.randn(10, 4, generator=generator)),
            torch.arange(6),
            torch.tensor([0, 2, 6]),
            auxiliary_hidden=list(draw[3:]) or None,
            negative_hidden=draw[2] if weight else None,
            **vars(spec),
        ).loss.backward()
    assert student.grad is not None
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm] / (2 * 6 * 4 * 10)
    assert products == (num_views + 4 if weight else 2)


def test_a_preset_and_a_peer_have_their_rows(rows):
    check_rows(rows, KEPT[:4])


@pytest.mark.exhaustive
def test_every_preset_and_peer_has_its_rows():
    check_rows(measured(VARIANTS), VARIANTS)


def check_rows(rows, variants):
    assert [(row["preset"], row["peer"], row["rollout"]) for row in rows] == [
        (variant, peer, rollout) for variant in variants for peer in PEERS for rollout in (False, True)
    ]
    for row in rows:
        assert set(row) == {"case", "preset", "peer", "rollout", "tokens", "note", *FIGURES}
        assert row["tokens"] == 4 * NEW_TOKENS
        assert len(row["samples_seconds"]) == 1
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["median_seconds"])
        if row["preset"] == "plain":
            assert row["ratio_to_plain"] == 1.0
        # No counter of this machine is read in a test, so that all is an estimate by the processor's time.
        assert row["joules"] > 0
        assert row["joules_measured"] or "8 W, an assumption" in row["joules_how"]
    for without, including in zip(rows[::2], rows[1::2], strict=True):
        assert without["joules"] < including["joules"]
        rollouts = [b - a for a, b in zip(without["samples_seconds"], including["samples_seconds"], strict=True)]
        assert min(rollouts) > 0


def test_table(rows):
    lines = steps.table([*rows[:-4], {**rows[-4], "extra_peak_bytes": 12_000_000}, *rows[-3:]]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    assert [line[0] for line in cells] == ["preset", *KEPT[:4]]
    assert len({len(line) for line in cells}) == 1
    plain = dict(zip(cells[0], cells[1], strict=True))
    assert plain["tokens/s: ours"] == f"{rows[0]['tokens_per_second']:.1f}"
    assert plain["time / plain with rollout: dense"] == "1.00"
    last = dict(zip(cells[0], cells[-1], strict=True))
    assert last["extra peak MB: ours"] == "12"
    assert last["extra peak MB: dense"] == ""
    assert "at most 1.5" in lines[-1]


def test_a_peer_that_fails_is_a_row(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no room | here")

    monkeypatch.setattr(step_runs, "dense_unisd_loss", fails)
    rows = steps.measure("tiny", CPU, 1, ["plain"], batch_size=2, new_tokens=2, with_memory=False)
    assert [row.get("failure") for row in rows] == [None, None, *["RuntimeError: no room / here"] * 2]
    text = steps.table(rows)
    assert "failed" in text
    assert "- plain, dense: RuntimeError: no room / here" in text


def test_command(monkeypatch, capsys, tmp_path):
    output = tmp_path / "steps.json"
    arguments = ["--model", "tiny", "--presets", "plain", "--rounds", "1", "--new-tokens", "3", "--batch-size", "2"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench/__main__.py", "steps", *arguments])
    assert steps.main([*arguments, "--device", "cpu", "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    assert "--model tiny" in written["environment"]["command"]
    assert len(written["rows"]) == 4
    assert all(row["extra_peak_bytes"] >= 0 for row in written["rows"])
    assert "| plain |" in capsys.readouterr().out
