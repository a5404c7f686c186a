"""Programs in bubblewrap (no network, no home, read-only files, a small /tmp) or, if asked for, in a mere process."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from tqdm.auto import tqdm

# Imported for their names, and so that their bytecode is there for the many interpreters to come.
from unisd.sandbox.inside import candidate, seccomp, tester
from unisd.sandbox.program import Outcome, Program

_PACKAGE = Path(__file__).resolve().parents[1]
_HIDDEN = (Path("/home"), Path("/root"), Path("/run"))


class Sandbox:
    """Runs programs, each in two processes: one holds the tests, the other the code, which never sees them.

    Args:
        unsafe_code: run it without bubblewrap, in processes of its own with limits and a folder. There only Python
            itself refuses the network and writing outside the folder, which code that means harm gets around, and
            everything can be read.
        seconds: of a program, on the clock; also the limit of its CPU time.
        memory_mib: address space of the code.
        file_mib: size of a file that it writes; all files of its /tmp together may have four times that.
        threads: of the code (not counted for root). It may start no process, by a filter of system calls on x86-64
            and ARM64.

    Raises:
        ValueError: no bubblewrap, or one that cannot make a sandbox here.
    """

    def __init__(
        self,
        unsafe_code: bool = False,
        *,
        seconds: float = 5.0,
        memory_mib: int = 1024,
        file_mib: int = 16,
        threads: int = 32,
    ) -> None:
        if not seconds > 0 or memory_mib < 64 or file_mib < 1 or threads < 1:
            raise ValueError("a sandbox needs seconds > 0, memory_mib >= 64, file_mib >= 1 and threads >= 1")
        self.unsafe_code, self.seconds = unsafe_code, seconds
        prefix = [] if unsafe_code else _bubblewrap(4 * file_mib << 20)
        # Without a namespace of users the limit would count the user's other processes too.
        limits = [math.ceil(seconds) + 1, memory_mib << 20, file_mib << 20, -1 if unsafe_code else threads]
        self._command = [*prefix, *_python(tester.__name__), json.dumps([_python(candidate.__name__), limits])]

    def run(self, program: Program) -> Outcome:
        """Run one program."""
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,
            )
            try:
                written, _ = process.communicate(json.dumps(asdict(program)).encode(), timeout=self.seconds)
            except subprocess.TimeoutExpired:
                return Outcome("timed out")
            finally:
                _end(process)
        try:
            return Outcome(**json.loads(written))
        except (ValueError, TypeError):
            return Outcome("crashed")  # the tests' process was ended

    def run_all(
        self, programs: Sequence[Program], *, workers: int | None = None, progress: str | None = None
    ) -> list[Outcome]:
        """Run many, `workers` at a time (default: one a core); `progress` is what to write before the bar."""
        with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
            runs = pool.map(self.run, programs)
            return list(tqdm(runs, total=len(programs), desc=progress, disable=progress is None, unit="program"))


def _python(module: str, run: str = "main(sys.argv[1:])") -> list[str]:
    start = f"import sys; sys.path.insert(0, {str(_PACKAGE.parent)!r}); import {module} as module; "
    return [sys.executable, "-I", "-c", f"{start}del sys.path[0]; module.{run}"]


def _bubblewrap(tmp_bytes: int) -> list[str]:
    """Command up to the one that runs inside.

    Args:
        tmp_bytes: size of its /tmp, which is memory.

    Raises:
        ValueError: it is not there, or Python does not start in it.
    """
    binary = shutil.which("bwrap")
    other = "or run a model's code without it, which is no security boundary: --unsafe_code (unsafe_code=True)"
    if binary is None:
        raise ValueError(f"running a model's code needs bubblewrap (bwrap): install bubblewrap, {other}")
    command = [binary, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    command += ["--ro-bind", "/", "/", "--size", str(tmp_bytes), "--tmpfs", "/tmp", "--proc", "/proc", "--dev", "/dev"]
    command += ["--remount-ro", "/dev"]
    hidden = _hidden()
    for folder in hidden:
        command += ["--size", "4096", "--tmpfs", str(folder)]
    # Python or this package may live in a folder that is hidden now.
    needed = [path for each in (sys.prefix, sys.base_prefix, _PACKAGE) for path in (Path(each), Path(each).resolve())]
    for folder in dict.fromkeys(needed):
        if any(folder.is_relative_to(parent) for parent in (Path("/tmp"), *hidden)):
            command += ["--ro-bind", str(folder), str(folder)]
    for folder in hidden:
        command += ["--remount-ro", str(folder)]
    command += ["--chdir", "/tmp"]
    tried = subprocess.run(
        [*command, *_python(seccomp.__name__, run="refuse_processes()")], capture_output=True, text=True, check=False
    )
    if tried.returncode != 0:
        said = (tried.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(f"bubblewrap cannot make a sandbox here ({said}): allow namespaces, {other}")
    return command


def _hidden() -> list[Path]:
    """Folders that are empty inside beside /tmp: homes, and sockets of services."""
    homes = [Path.home()]
    with contextlib.suppress(KeyError):  # a user without an entry has the home of the environment only
        homes.append(Path(pwd.getpwuid(os.getuid()).pw_dir))
    found = {folder.resolve() for folder in (*_HIDDEN, *homes)}
    return sorted(
        folder for folder in found if folder.is_dir() and folder != Path("/") and not folder.is_relative_to("/tmp")
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started."""
    with contextlib.suppress(ProcessLookupError):  # it has ended, and so have they
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
