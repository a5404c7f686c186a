"""One example of each GPU test is the smoke test: forty seconds that look at every kernel before anything is timed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before `-m smoke` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    examples: dict[str, pytest.Item] = {}
    for item in items:
        if FOLDER not in item.path.parents:
            continue
        name = item.nodeid.split("[")[0]
        # bfloat16 is what a GPU is used with and what no test without one can see.
        if name not in examples or (_in_bfloat16(item) and not _in_bfloat16(examples[name])):
            examples[name] = item
    for item in examples.values():
        item.add_marker("smoke")


def _in_bfloat16(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and any(value is torch.bfloat16 for value in callspec.params.values())
