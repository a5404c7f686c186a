"""Settings of the whole suite: reproducible hypothesis runs, one thread a worker, no network."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import nullcontext

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch

# Without a GPU the Triton kernels run under the interpreter, which is chosen when they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings

from tests.interpreter_patches import quicken_the_interpreter
from tests.last_bit import LastBit
from tests.sticky_errors import pytest_exception_interact, pytest_runtest_logfinish  # noqa: F401

# torch for CPUs alone brings no Triton; the tests of its kernels are skipped there.
if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    quicken_the_interpreter()


def pytest_configure(config: pytest.Config) -> None:
    """Before the tests are imported, which take their number of random examples from here."""
    settings.register_profile(
        "suite",
        deadline=None,
        derandomize=True,
        max_examples=25 if config.option.markexpr == "not exhaustive" else 60,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    settings.load_profile("suite")


if "UNISD_TEST_THREADS" in os.environ:
    torch.set_num_threads(int(os.environ["UNISD_TEST_THREADS"]))
elif "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _last_bit(request: pytest.FixtureRequest) -> Iterator[None]:
    """With UNISD_TEST_LAST_BIT, the library sums of another processor (tests/last_bit.py)."""
    seed = os.environ.get("UNISD_TEST_LAST_BIT")
    # torch.compile refuses to trace under a dispatch mode.
    with LastBit(int(seed)) if seed and "compile" not in request.node.nodeid else nullcontext():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        # Not by `item.keywords`, which has the names of folders too: in a clone named "gpu" nothing would run.
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Nothing that is imported becomes garbage: looking for it is a sixth of the time of a collection."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """What has been imported by now stays: the collector need not look through it again.

    The Trainer collects at the end of each run, a quarter of a second for the modules of this suite, half of the time
    of its tests.
    """
    gc.enable()
    gc.collect()
    gc.freeze()
    if processes := sys.modules.get("tests.processes"):
        processes.start_stem()


def pytest_unconfigure() -> None:
    if processes := sys.modules.get("tests.processes"):
        processes.end_stem()


@pytest.fixture(autouse=True, scope="module")
def _freeze() -> Iterator[None]:
    """Nor through what the tests have imported since, dynamo, Lightning and the like: twice as much again."""
    yield
    gc.collect()
    gc.freeze()
