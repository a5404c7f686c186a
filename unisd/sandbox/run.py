"""Programs in bubblewrap (no network, read-only files, a private /tmp) or, if asked for, in a mere process."""

from __future__ import annotations

import contextlib
import json
import math
import os
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
from unisd.sandbox.inside import candidate, tester
from unisd.sandbox.program import Outcome, Program

ISOLATIONS = ("bubblewrap", "process")

_ROOT = Path(__file__).resolve().parents[2]


class Sandbox:
    """Runs programs, each in two processes: one holds the tests, the other the code, which never sees them.

    Args:
        isolation: "bubblewrap"; or "process": own processes, limits and folder. There only Python itself refuses the
            network and files outside the folder, which code that means harm gets around.
        seconds: of a program, on the clock; also the limit of its CPU time.
        memory_mib: address space of the code.
        file_mib: size of a file that it writes.
        processes: of the code, where bubblewrap counts them apart from the user's others.

    Raises:
        ValueError: an unknown isolation, no bubblewrap, or one that may not make namespaces here.
    """

    def __init__(
        self,
        isolation: str = "bubblewrap",
        *,
        seconds: float = 5.0,
        memory_mib: int = 1024,
        file_mib: int = 16,
        processes: int = 32,
    ) -> None:
        if isolation not in ISOLATIONS:
            raise ValueError(f"isolation must be one of {', '.join(ISOLATIONS)}, got {isolation!r}")
        if not seconds > 0 or memory_mib < 64 or file_mib < 0 or processes < 0:
            raise ValueError("a sandbox needs seconds > 0, memory_mib >= 64, file_mib >= 0 and processes >= 0")
        self.isolation, self.seconds = isolation, seconds
        wrapped = isolation == "bubblewrap"
        self._prefix = _bubblewrap() if wrapped else []
        limits = [math.ceil(seconds) + 1, memory_mib << 20, file_mib << 20, processes if wrapped else -1]
        self._command = [*self._prefix, *_python(tester.__name__), json.dumps([_python(candidate.__name__), limits])]

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


def _python(module: str) -> list[str]:
    start = f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from {module} import main; "
    return [sys.executable, "-I", "-c", f"{start}del sys.path[0]; main(sys.argv[1:])"]


def _bubblewrap() -> list[str]:
    """Command up to the one that runs inside.

    Raises:
        ValueError: it is not there, or may not make namespaces.
    """
    binary = shutil.which("bwrap")
    other = "or allow a model's code to run without it: isolation='process' (--isolation process)"
    if binary is None:
        raise ValueError(f"running a model's code needs bubblewrap (bwrap): install bubblewrap, {other}")
    command = [binary, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    command += ["--ro-bind", "/", "/", "--tmpfs", "/tmp", "--tmpfs", "/run", "--proc", "/proc", "--dev", "/dev"]
    # Python or this package may live in a folder that is private now.
    for folder in dict.fromkeys([Path(sys.prefix), Path(sys.base_prefix), _ROOT]):
        if folder.is_relative_to("/tmp") or folder.is_relative_to("/run"):
            command += ["--ro-bind", str(folder), str(folder)]
    command += ["--chdir", "/tmp"]
    tried = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        raise ValueError(f"bubblewrap cannot make a sandbox here ({tried.stderr.strip()}): allow namespaces, {other}")
    return command


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started."""
    with contextlib.suppress(ProcessLookupError):  # it has ended, and so have they
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
