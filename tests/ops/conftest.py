"""The operations' tests run once for each filling of the tiles: `impl=None` then means that one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from unisd_kernels import dispatch

_OF_EVERY_FILLING = {"test_loss", "test_divergence", "test_logprobs", "test_cost"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] in _OF_EVERY_FILLING:
        metafunc.parametrize("filling", ["native", "torch"], indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def filling(request: pytest.FixtureRequest) -> Iterator[str | None]:
    before, name = dict(dispatch._PREFERENCE), getattr(request, "param", None)
    if name is not None:
        # float64 goes to PyTorch's in any case.
        dispatch._PREFERENCE["cpu"] = (name, "torch")
    yield name
    dispatch._PREFERENCE.update(before)
