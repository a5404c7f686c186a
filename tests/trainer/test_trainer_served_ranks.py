"""Auxiliary views scored by a server under DDP and FSDP2: what one process gives that scores them itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from tests import fake_server
from tests.processes import run_module
from tests.trainer import served_worker, tiny_run

TYPES = {"ddp": "DistributedType.MULTI_CPU", "fsdp2": "DistributedType.FSDP"}
EVERY = list(served_worker.KINDS)
OF_A_RANK = tiny_run.NUM_ROWS // served_worker.RANKS
SCORED = 3 * OF_A_RANK  # requests of a rank in a step
COMPARED = OF_A_RANK  # and once, for one context of its first micro-batch, to compare with what it scores itself


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with fake_server.running(tiny_run.llama()) as server:
        yield server


def two_ranks(folder: Path, engine: str, server, kinds: list[str]) -> None:
    run_module("tests.trainer.served_worker", folder, engine, server.url, *kinds, timeout=900, CUDA_VISIBLE_DEVICES="")


def fails_rank_1_in_its_second_step(server) -> None:
    score, of_rank_1 = server.score, []
    key = f"Bearer {served_worker.key_of('refused', 1)}"

    def scored(body):
        with server.lock:
            if any(given is body and sent_with == key for _, sent_with, given in server.bodies):
                of_rank_1.append(body)
            fails = len(of_rank_1) > COMPARED + SCORED and of_rank_1[-1] is body
        return {"text": ""} if fails else score(body)

    server.score = scored


def check_equals_one_process(folder: Path, engine: str, kind: str) -> None:
    alone = served_worker.train(folder / "alone" / kind, kind, None, micro_batches=served_worker.RANKS)
    found = torch.load(folder / kind / "rank0.pt")
    assert (found["type"], alone["type"]) == (TYPES[engine], "DistributedType.NO")
    assert min(alone["least"]) < 0.9  # the weights matter here
    for name in ("losses", "weight", "least"):
        assert len(found[name]) == served_worker.STEPS
        assert found[name] == pytest.approx(alone[name], abs=1e-5), name
    for of_ranks, of_one in zip(found["gradients"], alone["gradients"], strict=True):
        tiny_run.assert_same_gradients(of_ranks, of_one, 1e-5)


def check_asks_once(bodies: list, kind: str) -> None:
    """Each rank for its own sequences; those of the comparison come again."""
    every = []
    for rank in range(served_worker.RANKS):
        key = f"Bearer {served_worker.key_of(kind, rank)}"
        sent = Counter(tuple(body["prompt"]) for _, sent_with, body in bodies if sent_with == key)
        assert sent.total() == COMPARED + served_worker.STEPS * SCORED
        assert sum(count - 1 for count in sent.values()) == COMPARED
        every += sent
    assert len(every) == len(set(every))


def check_one_message(folder: Path) -> None:
    """That of the rank whose server failed; the other one lost it, and says nothing."""
    files = [folder / "refused" / f"rank{rank}" for rank in range(served_worker.RANKS)]
    first, second = (file.with_suffix(".txt").read_text() for file in files)
    assert [int(file.with_suffix(".code").read_text()) for file in files] == [1, 2], first + second
    message = "unisd train: error: "
    assert (first + second).count(message) == second.count(message) == 1
    assert "answered without prompt_logprobs" in second
    assert "Traceback" not in first + second


@pytest.mark.exhaustive  # a group of processes costs as much as a hundred other tests
@pytest.mark.parametrize("engine", ["fsdp2", "ddp"])
def test_two_ranks(tmp_path, server, engine):
    fails_rank_1_in_its_second_step(server)
    two_ranks(tmp_path, engine, server, EVERY)
    check_one_message(tmp_path)
    for kind in set(EVERY) - {"refused"}:
        check_equals_one_process(tmp_path, engine, kind)
        check_asks_once(server.bodies, kind)
