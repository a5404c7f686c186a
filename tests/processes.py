"""A module of the tests in a process of its own, forked from one that has imported what the tests import."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

import torch

from bench.studies.forked import forked, print_to

ROOT = Path(__file__).parents[1]


class Request(NamedTuple):
    """What to run: with which variables, where its output goes, and for how many seconds at most."""

    command: list[str]
    variables: dict[str, str]
    output: Path
    errors: Path
    timeout: float


class Stem:
    """A process forked from this one, of which the modules are forked: as this one was then, and with one thread.

    A test's own process may have threads by the time it needs a worker, and to import everything again takes longer
    than most workers do. The stem ends with its owner, however that ends, and what runs then with it.
    """

    def __init__(self) -> None:
        self._requests, served = Pipe()
        self._process = os.fork()
        if self._process == 0:
            try:
                self._requests.close()
                _serve(served)
            finally:
                os._exit(0)
        served.close()

    def run(self, request: Request) -> int | None:
        """Exit status, negative for a signal's number; None after the timeout, when what was started is killed."""
        self._requests.send(request)
        return self._requests.recv()

    def end(self) -> None:
        self._requests.close()
        os.waitpid(self._process, 0)


_stem: Stem | None = None


def start_stem() -> None:
    """Not beside a GPU: a fork of a process that has asked for devices can neither use nor hide them."""
    global _stem
    if not torch.cuda.is_available():
        _stem = Stem()


def end_stem() -> None:
    global _stem
    if _stem is not None:
        _stem.end()
        _stem = None


def run_module(module: str, *arguments: object, timeout: float, **environment: str) -> str:
    """`python -m module`, on one thread a process: its standard output. Standard error is shown if it fails.

    Variables that are read when a module is imported have to be those of the tests.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        output.touch()
        errors.touch()
        request = Request([module, *map(str, arguments)], variables, output, errors, timeout)
        try:
            status = _in_new_process(request) if _stem is None else _stem.run(request)
        except BaseException:
            end_stem()  # an interrupt: the module must not run on
            raise
        said = errors.read_text()[-4000:]
        assert status is not None, f"{module} took more than {timeout} s\n{said}"
        assert status == 0, f"{module} ended with {status}\n{said}"
        return output.read_text()


def _in_new_process(request: Request) -> int | None:
    command = [sys.executable, "-m", *request.command]
    with request.output.open("w") as output, request.errors.open("w") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=request.variables, stdout=output, stderr=errors, start_new_session=True
        )
        try:
            return process.wait(request.timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _serve(requests: Connection) -> None:
    # An interrupt from the keyboard reaches all processes; the owner decides what it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            request = requests.recv()
        except EOFError:
            return
        child = forked(partial(_run, request, requests))
        os.setpgid(child, child)
        ended = os.pidfd_open(child)
        # The pipe has something before the child has ended only if its other end is closed.
        in_time = ended in wait([ended, requests], request.timeout)
        os.close(ended)
        # With what it started. Before it is waited for, its number is no other's.
        os.killpg(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try:
            requests.send(status if in_time else None)
        except BrokenPipeError:
            return


def _run(request: Request, requests: Connection) -> int:
    """The module in this process, which is the stem's child: its exit status."""
    requests.close()
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(request.variables)
    torch.set_num_threads(1)
    with request.output.open("w") as output, request.errors.open("w") as errors:
        print_to(output.fileno(), errors.fileno())
    sys.argv = list(request.command)
    try:
        runpy.run_module(request.command[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
