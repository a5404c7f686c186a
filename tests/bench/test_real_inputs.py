"""Hidden states of a real model for the benchmarks: what they are, and their file."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from bench.inputs import smollm2
from bench.inputs.smollm2 import describe, real_views
from unisd.completions import encode_pairs
from unisd.data.procedural import procedural_rows
from unisd.models import SMOLLM2, is_fetched, load_model
from unisd_kernels import LMHead
from unisd_kernels.config import LossInputs

NUM_ROWS, NUM_AUXILIARY = 64, 1
CPU = torch.device("cpu")

needs_model = pytest.mark.skipif(
    not is_fetched(SMOLLM2), reason="SmolLM2 is not in the user cache (fetch_model puts it there)"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench-inputs")


@pytest.fixture(scope="module")
def model_and_tokenizer() -> tuple[Any, Any]:
    return load_model(SMOLLM2)


@pytest.fixture(scope="module")
def views(folder: Path, model_and_tokenizer: tuple[Any, Any]) -> LossInputs:
    with pytest.MonkeyPatch.context() as once:
        once.setattr(smollm2, "load_model", lambda folder: model_and_tokenizer)
        return real_views(NUM_ROWS, NUM_AUXILIARY, CPU, cache_dir=folder)


def hidden_of(views: LossInputs) -> list[torch.Tensor]:
    return [views.student_hidden, views.teacher_hidden, views.negative_hidden, *views.auxiliary_hidden]


@pytest.mark.model
@needs_model
def test_shapes(views: LossInputs) -> None:
    columns, width = views.student_head.weight.shape
    assert len(views.auxiliary_hidden) == NUM_AUXILIARY
    for hidden in hidden_of(views):
        assert hidden.shape == (NUM_ROWS, width)
        assert hidden.dtype == views.student_head.weight.dtype == torch.float32
        assert hidden.is_contiguous()
    assert views.target_ids.shape == (NUM_ROWS,)
    assert views.target_ids.dtype == torch.int64
    assert 0 <= int(views.target_ids.min()) <= int(views.target_ids.max()) < columns
    assert views.cu_seqlens.dtype == torch.int32
    assert views.cu_seqlens[0] == 0
    assert views.cu_seqlens[-1] == NUM_ROWS
    assert bool((views.cu_seqlens.diff() > 0).all())


@pytest.mark.model
@needs_model
def test_hidden_states_are_those_of_the_model(views: LossInputs, model_and_tokenizer: tuple[Any, Any]) -> None:
    """The second sequence of each view by itself, through the causal model: unpadded, with its head."""
    model, tokenizer = model_and_tokenizer
    row = procedural_rows(2, num_auxiliary=NUM_AUXILIARY)[1]
    start, end = views.cu_seqlens[1:3].tolist()
    assert end < NUM_ROWS  # not the cut one
    prompts = [row["prompt"], row["teacher_prompt"], row["negative_prompt"], *row["auxiliary_prompts"]]
    for prompt, hidden in zip(prompts, hidden_of(views), strict=True):
        (pair,) = encode_pairs(tokenizer, [prompt], [row["completion"]])
        assert views.target_ids[start:end].tolist() == pair.completion_ids
        ids = torch.tensor([pair.prompt_ids + pair.completion_ids])
        with torch.no_grad():
            output = model(ids, output_hidden_states=True)
        predicting = slice(len(pair.prompt_ids) - 1, -1)
        torch.testing.assert_close(hidden[start:end], output.hidden_states[-1][0, predicting], rtol=1e-4, atol=1e-3)
        logits = hidden[start:end] @ views.student_head.weight.T
        torch.testing.assert_close(logits, output.logits[0, predicting], rtol=1e-4, atol=1e-2)


@pytest.mark.model
@needs_model
def test_targets_are_the_replies_cut_to_length(views: LossInputs, model_and_tokenizer: tuple[Any, Any]) -> None:
    _, tokenizer = model_and_tokenizer
    num_sequences = views.cu_seqlens.numel() - 1
    rows = procedural_rows(num_sequences, num_auxiliary=0)
    pairs = encode_pairs(tokenizer, [row["prompt"] for row in rows], [row["completion"] for row in rows])
    every = [pair.completion_ids for pair in pairs]
    assert views.target_ids.tolist() == list(chain.from_iterable(every))[:NUM_ROWS]
    assert views.cu_seqlens.diff().tolist()[:-1] == [len(ids) for ids in every[:-1]]
    assert sum(map(len, every[:-1])) < NUM_ROWS  # none more than needed


@pytest.mark.model
@needs_model
def test_weight_is_the_models_head(views: LossInputs, model_and_tokenizer: tuple[Any, Any]) -> None:
    head = LMHead.from_model(model_and_tokenizer[0])
    assert torch.equal(views.student_head.weight, head.weight)
    assert (head.bias, head.logit_scale, head.softcap) == (None, 1.0, None)


@pytest.mark.model
@needs_model
def test_contexts_differ_and_the_demonstration_helps(views: LossInputs) -> None:
    every = hidden_of(views)
    for place, one in enumerate(every):
        assert not any(torch.equal(one, other) for other in every[:place])
    of_targets = [
        (hidden @ views.student_head.weight.T).log_softmax(-1).gather(1, views.target_ids[:, None]).mean()
        for hidden in every[:2]
    ]
    assert of_targets[1] > of_targets[0]


@pytest.mark.model
@needs_model
def test_description(views: LossInputs) -> None:
    temperature = 0.7
    student, teacher = (
        (hidden.double() @ views.student_head.weight.double().T / temperature).log_softmax(-1)
        for hidden in (views.student_hidden, views.teacher_hidden)
    )
    divergence = (teacher.exp() * (teacher - student)).sum(-1)
    expected = {
        "forward_kl_median": divergence.quantile(0.5),
        "forward_kl_p90": divergence.quantile(0.9),
        "teacher_entropy_mean": -(teacher.exp() * teacher).sum(-1).mean(),
    }
    assert describe(views, temperature) == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-3
    )


@pytest.mark.model
@needs_model
def test_second_call_reads_the_file(views: LossInputs, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_compute", _fail)
    again = real_views(NUM_ROWS, NUM_AUXILIARY, CPU, cache_dir=folder)
    assert all(map(torch.equal, hidden_of(views), hidden_of(again)))
    assert torch.equal(views.student_head.weight, again.student_head.weight)
    assert torch.equal(views.target_ids, again.target_ids)
    assert torch.equal(views.cu_seqlens, again.cu_seqlens)
    assert [path.name for path in folder.iterdir()] == [f"smollm2-n64-k1-seed0-v{smollm2.VERSION}.pt"]


@pytest.fixture
def without_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(smollm2, "fetch_model", lambda name: tmp_path)
    monkeypatch.setattr(smollm2, "_head_weight", lambda folder: torch.zeros(3, 2))


@pytest.mark.usefixtures("without_model")
@pytest.mark.parametrize(("num_rows", "num_auxiliary", "seed"), [(2, 0, 0), (1, 1, 0), (1, 0, 1)])
def test_each_setting_has_its_own_file(
    num_rows: int, num_auxiliary: int, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "_compute", _empty)
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path))
    real_views(1, 0, CPU)
    real_views(num_rows, num_auxiliary, CPU, seed)
    assert len(list((tmp_path / "bench-inputs").iterdir())) == 2
    monkeypatch.setattr(smollm2, "_compute", _fail)
    real_views(num_rows, num_auxiliary, CPU, seed)


@pytest.mark.usefixtures("without_model")
@pytest.mark.parametrize("stage", ["save", "replace"])
def test_interrupted_write_leaves_no_file(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        if stage == "save":
            raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_compute", _empty)
    monkeypatch.setattr(smollm2.torch, "save", save)
    if stage == "replace":
        monkeypatch.setattr(smollm2.os, "replace", _fail)
    folder = tmp_path / "made" / "here"
    with pytest.raises((KeyboardInterrupt, AssertionError)):
        real_views(1, 0, CPU, cache_dir=folder)
    assert list(folder.iterdir()) == []


def test_a_model_that_cannot_be_fetched_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / SMOLLM2).mkdir()  # incomplete: fails without asking a package index
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="Delete that folder"):
        real_views(1, 0, CPU)
    assert not (tmp_path / "bench-inputs").exists()


@pytest.mark.parametrize(("num_rows", "num_auxiliary"), [(0, 1), (-1, 0), (1, -1)])
def test_sizes_out_of_range_are_refused(num_rows: int, num_auxiliary: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        real_views(num_rows, num_auxiliary, CPU, cache_dir=tmp_path)


def _fail(*arguments: object) -> Any:
    raise AssertionError("must not be called")


def _empty(*arguments: object) -> dict[str, Any]:
    names = ("student_hidden", "teacher_hidden", "negative_hidden", "target_ids", "cu_seqlens")
    return {**{name: torch.zeros(1) for name in names}, "auxiliary_hidden": []}
