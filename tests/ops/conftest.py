"""The operations' tests run once for each backend of the tiles: `impl=None` then means that one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from unisd_kernels.backends import registry

_OF_EVERY_BACKEND = {"test_loss", "test_divergence", "test_logprobs", "test_cost"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] in _OF_EVERY_BACKEND:
        metafunc.parametrize("backend", ["native", "torch"], indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str | None]:
    before, name = dict(registry._PREFERENCE), getattr(request, "param", None)
    if name is not None:
        # float64 goes to PyTorch's in any case.
        registry._PREFERENCE["cpu"] = (name, "torch")
    yield name
    registry._PREFERENCE.update(before)
