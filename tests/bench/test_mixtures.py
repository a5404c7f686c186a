"""`python -m bench mixtures`: every peer computes the mixture's gradient; ratios are within a round; the table."""

import json

import pytest
import torch

from bench.__main__ import main
from bench.cases import Case
from bench.inputs.sets import make_inputs
from bench.studies import mixtures
from unisd_kernels import LMHead, linear_divergence


def test_ours_and_dense_are_the_same_thing():
    inputs = make_inputs(Case("mixtures", 9, 8, 50, num_auxiliary=3, num_sequences=1), torch.device("cpu"))
    for num_views in (1, 3):
        ours, dense = (step(num_views)(inputs) for step in (mixtures.mixture_step, mixtures.dense_step))
        torch.testing.assert_close(ours, dense, rtol=0.0, atol=1e-4 * float(dense.abs().max()))
    assert not torch.allclose(ours, mixtures.mixture_step(1)(inputs), rtol=1e-2, atol=0)
    assert torch.isfinite(mixtures.scored_step(3)(inputs)).all()


def test_the_command_and_its_table(tmp_path, capsys):
    file = tmp_path / "result.json"
    words = ["--rounds", "2", "--rows", "8", "--width", "8", "--columns", "40", "--no-digits", "--output", str(file)]
    assert main(["mixtures", *words]) == 0
    result = json.loads(file.read_text())
    rows = {row["peer"]: row for row in result["times"]}
    assert [row["views"] for row in result["times"]][:9] == [None, *range(1, 9)]
    first, last = rows["mixture, K = 1"], rows["mixture, K = 8"]
    assert len(last["samples_seconds"]) == len(last["samples_processor_seconds"]) == 2
    each = [a / b for a, b in zip(last["samples_seconds"], first["samples_seconds"], strict=True)]
    assert last["ratio_to_first"]["median"] == pytest.approx(sum(each) / 2)
    assert first["ratio_to_first"]["median"] == 1.0
    last["processor_ratio_to_first"]["median"] = 9.0
    assert "within +800.0% and" in mixtures.table(result)
    assert "| mixture, K = 8 |" in capsys.readouterr().out


def test_digits_of_a_mixture_of_one_are_the_divergences_own():
    views = make_inputs(Case("mixtures", 6, 16, 60, num_auxiliary=2, num_sequences=1), torch.device("cpu"))
    rows = {row["mixture"]: row for row in mixtures.measure_digits(views)}
    assert list(rows) == ["self", "consensus", "contrastive", "pmi"]
    student, teacher = (view.bfloat16().double() for view in (views.student_hidden, views.teacher_hidden))
    head = LMHead(views.student_head.weight.bfloat16().double())
    exact = linear_divergence(student, head, 1.5 * teacher - 0.5 * student, head, temperature=mixtures.TEMPERATURE)
    assert rows["pmi"]["mean"] == pytest.approx(exact.mean().item())
    assert rows["self"]["ours"]["largest"] < 1e-4 < rows["self"]["bfloat16 logits"]["largest"]
    assert all(row["ours"]["mean"] < row["bfloat16 logits"]["mean"] for row in rows.values())
