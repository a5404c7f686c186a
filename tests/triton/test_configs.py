"""The choice of a tile: the table's default, or a measurement that is made once and kept."""

from __future__ import annotations

import pytest
import torch

from unisd_kernels.backends.triton import configs
from unisd_kernels.backends.triton.configs import TABLE, GemmConfig, candidates, choose

CUDA = torch.device("cuda")
SHAPE = (2000, 128256, 4096)


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """An H100 as far as the choice can see; returns the configurations that were run and what they take."""
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU / of a test")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path))
    monkeypatch.setattr(configs, "_winners", {})
    monkeypatch.setattr(configs, "measured", {})
    runs: list[GemmConfig] = []

    def milliseconds(run, option):
        run(option)
        return 2.0 - 0.1 * candidates("score", CUDA).index(option)  # the last one is the fastest

    monkeypatch.setattr(configs, "_median_milliseconds", milliseconds)
    return runs


def test_without_the_variable_the_default_and_no_run(hopper, monkeypatch):
    monkeypatch.delenv("UNISD_TRITON_AUTOTUNE", raising=False)
    assert choose("score", CUDA, SHAPE, hopper.append) == TABLE["sm_90"]["score"][0]
    assert not hopper


def test_the_fastest_is_kept_for_this_process_and_the_next(hopper, monkeypatch, tmp_path):
    monkeypatch.setenv("UNISD_TRITON_AUTOTUNE", "1")
    options = candidates("score", CUDA)
    assert choose("score", CUDA, SHAPE, hopper.append) == options[-1]
    assert hopper == list(options)
    # The same power of two of rows; then a new process.
    assert choose("score", CUDA, (1500, *SHAPE[1:]), hopper.append) == options[-1]
    monkeypatch.setattr(configs, "_winners", {})
    assert choose("score", CUDA, SHAPE, hopper.append) == options[-1]
    assert len(hopper) == len(options)
    assert [path.name for path in tmp_path.iterdir()] == [configs._file(CUDA).name]
    # Another shape is another measurement, and both are kept.
    choose("score", CUDA, (2000, 50257, 768), hopper.append)
    assert len(hopper) == 2 * len(options)
    assert len(configs._load(CUDA)) == 2


def test_a_kept_tile_that_is_no_candidate_any_more_is_measured_again(hopper, monkeypatch):
    monkeypatch.setenv("UNISD_TRITON_AUTOTUNE", "1")
    configs._store(CUDA, {"score/2048/128256/4096": GemmConfig(1, 2, 3, 4, 5)})
    assert choose("score", CUDA, SHAPE, hopper.append) == candidates("score", CUDA)[-1]
    assert hopper


def test_nothing_is_measured_while_a_graph_is_captured(hopper, monkeypatch):
    monkeypatch.setenv("UNISD_TRITON_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose("score", CUDA, SHAPE, hopper.append) == candidates("score", CUDA)[0]
    assert not hopper


def test_other_gpus_get_the_tiles_that_ask_for_the_least(monkeypatch):
    for name, expected in (("sm_89", "sm_80"), ("sm_103", "sm_100"), ("hip", "hip"), ("xpu", "sm_80")):
        monkeypatch.setattr(configs, "architecture", lambda device, name=name: name)
        for kind in TABLE["sm_90"]:
            assert candidates(kind, CUDA) == TABLE[expected][kind]


def test_every_architecture_has_every_kind():
    assert {frozenset(kinds) for kinds in TABLE.values()} == {frozenset(TABLE["sm_80"])}
