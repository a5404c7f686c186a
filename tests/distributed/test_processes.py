"""A module in a process of its own: what it is given, how it fails, and that nothing of it stays."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests import processes
from tests.distributed import process_worker
from tests.processes import ROOT, Stem, run_module

MODULE = "tests.distributed.process_worker"


@pytest.fixture(params=["forked", pytest.param("new", marks=pytest.mark.exhaustive)])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As on a machine without a GPU, and as on one with it."""
    if request.param == "new":
        monkeypatch.setattr(processes, "_stem", None)
    elif processes._stem is None:
        pytest.skip("beside a GPU nothing is forked")
    return request.param


def runs(process: int) -> bool:
    """Whether a process is there and has not ended."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def assert_ends(process: int) -> None:
    deadline = time.monotonic() + 60
    while runs(process):
        assert time.monotonic() < deadline, f"{process} runs on"
        time.sleep(0.01)


def test_what_it_is_given(how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNISD_TEST_TOLD", "before")
    monkeypatch.delenv("MPLBACKEND")  # which the tests have when the stem is made
    more = ["a", tmp_path] if how == "forked" else []
    for told in ("first", "second"):
        facts = json.loads(run_module(MODULE, "tell", *more, timeout=60, UNISD_TEST_TOLD=told))
        assert facts == {
            "arguments": list(map(str, more)),
            "variables": [told, None],
            "folder": str(ROOT),
            "threads": [1, 1],
            "interrupts": True,
            "group": True,
            "imported_by": process_worker.IMPORTED if more else None,
        }
    assert os.environ["UNISD_TEST_TOLD"] == "before"


def test_a_failure_shows_what_was_said(how: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match=f"{MODULE} ended with 1") as failure:
        run_module(MODULE, "raise", timeout=60)
    for line in ("said by a library", "RuntimeError: said by the module"):
        assert line in str(failure.value)
    assert "said by" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(("code", "said"), [("3", "ended with 3"), ("why", "ended with 1\nwhy")])
def test_a_status_is_a_failure(how: str, code: str, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        run_module(MODULE, "exit", code, timeout=60)
    assert run_module(MODULE, "exit", "0", timeout=60) == ""


def test_after_the_timeout_all_of_it_is_killed(how: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"took more than [\d.]+ s"):
        run_module(MODULE, "hang", tmp_path / "child", timeout=2 if how == "forked" else 20)
    assert_ends(int((tmp_path / "child").read_text()))
    # And the next one runs.
    assert run_module(MODULE, "tell", timeout=60)


@pytest.mark.parametrize("end", ["interrupted", "killed"])
def test_nothing_stays_when_the_tests_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    if processes._stem is None:
        pytest.skip("beside a GPU nothing is forked")
    file = tmp_path / "child"
    owner = os.fork()
    if owner == 0:
        # The stem of these tests is not this process's.
        processes._stem = Stem()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            run_module(MODULE, "hang", file, timeout=600)
        finally:
            os._exit(processes._stem is not None)
    deadline = time.monotonic() + 60
    while not file.exists() or not file.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(owner, signal.SIGINT if end == "interrupted" else signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(owner, 0)[1]) == (0 if end == "interrupted" else -signal.SIGKILL)
    assert_ends(int(file.read_text()))
