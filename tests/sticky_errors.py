"""Ends a test process whose GPU is lost: after an illegal access or an assertion on the device every further CUDA call
of the process fails, and would blame tests that did nothing wrong. Hooks, which tests/conftest.py takes over.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

STATUS = int(pytest.ExitCode.TESTS_FAILED)  # with another one pytest prints no summary
_lost: list[str] = []


def gpu_is_lost() -> str | None:
    """The GPU's answer if it works no more for this process."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return None


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(call: pytest.CallInfo[object]) -> None:
    if call.excinfo is not None and (answer := gpu_is_lost()):
        _lost.append(answer)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """Once the test's own failure is reported."""
    if not _lost:
        return
    message = f"the GPU is lost for this process since {nodeid}: {_lost[0]}"
    if "PYTEST_XDIST_WORKER" in os.environ:
        print(message, file=sys.__stderr__, flush=True)
        os._exit(STATUS)  # pytest-xdist goes on with a fresh worker
    pytest.exit(message, STATUS)
