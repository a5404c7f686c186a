"""Run the tests as other machines would, and write docs/machines.md: `python scripts/machines.py`, or `make machines`.

One machine stands in for many: the instruction set of this package's kernels, of PyTorch's own and of its matrix
libraries is limited by environment variables; sums that come out with another last bit are simulated
(tests/last_bit.py); one and two threads; the oldest and the newest torch, each in an environment of its own; the
oldest and the newest triton and the newest transformers, each in a folder before this environment's. What cannot be
simulated is a processor that has more than this one.

Every row is one run of pytest. The rows do not depend on each other: `--only` runs some of them and keeps the others'
results, which lie in bench/results/machines.json, with where and when each was run; its log is in runs/machines.
`--failed` runs, in each row, only what failed there the last time, and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "runs" / "machines"
RESULTS = ROOT / "bench" / "results" / "machines.json"
PAGE = ROOT / "docs" / "machines.md"
# Where numbers are computed. bench, build and docs are run by `make test` as they are.
TESTS = ("tests/reference", "tests/ops", "tests/triton", "tests/trainer", "tests/evaluation", "tests/data", "tests/cli")
KERNELS = ("tests/reference", "tests/ops")
TRITON = ("tests/triton",)
MODELS = ("tests/trainer", "tests/heads", "tests/views", "tests/evaluation", "tests/generation", "tests/cli")
# What a row's tests are called in the page.
CALLED = {TESTS: "all that compute", KERNELS: "kernels", TRITON: "Triton's", MODELS: "with models"}


@dataclass(frozen=True)
class Machine:
    """One row: what is set, and which tests run under it."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    tests: tuple[str, ...] = TESTS
    torch: str | None = None
    packages: tuple[str, ...] = ()  # that are in a folder of their own, before this environment's: "triton==3.9.0"


OLD = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "UNISD_CPU_ISA": "avx2",
}


def machines(torch_versions: list[str]) -> list[Machine]:
    def setting(name: str, value: str, tests: tuple[str, ...] = TESTS) -> Machine:
        return Machine(f"{name}={value}", {name: value}, tests)

    return [
        Machine("this machine"),
        *(setting("UNISD_CPU_ISA", isa, KERNELS) for isa in ("scalar", "avx2", "avx512")),
        *(setting("ATEN_CPU_CAPABILITY", isa) for isa in ("default", "avx2", "avx512")),
        setting("ONEDNN_MAX_CPU_ISA", "AVX2"),
        *(setting("MKL_ENABLE_INSTRUCTIONS", isa) for isa in ("AVX2", "SSE4_2")),
        Machine(" ".join(f"{name}={value}" for name, value in OLD.items()), OLD),
        *(setting("UNISD_TEST_LAST_BIT", seed) for seed in ("1", "2")),
        *(setting("UNISD_TEST_THREADS", threads, KERNELS) for threads in ("1", "2")),
        *(Machine(f"torch {version}", {}, TESTS, version) for version in torch_versions),
        Machine("triton 3.6.0", {}, TRITON, packages=("triton==3.6.0", "numpy==2.3.5")),  # whose interpreter needs it
        Machine("triton 3.9.0", {}, TRITON, packages=("triton==3.9.0",)),
        Machine("transformers 5.24.0", {}, MODELS, packages=("transformers==5.24.0",)),
    ]


def python_of(machine: Machine, environments: Path) -> Path:
    """The interpreter of a row: this one, or that of an environment with the torch it names.

    Raises:
        SystemExit: no such environment; the message says how to make it.
    """
    if machine.torch is None:
        return Path(sys.executable)
    python = environments / f"torch-{machine.torch}" / "bin" / "python"
    if not python.exists():
        raise SystemExit(
            f"{python} is not there. Make it, with several GiB of torch's own needs:\n"
            f"  python3 -m venv {python.parents[1]}\n"
            f"  {python} -m pip install torch=={machine.torch} 'numpy<2.4'  # which triton 3.6 needs\n"
            f"  {python} -m pip install transformers trl peft accelerate datasets gguf matplotlib pyyaml pytest "
            "pytest-xdist hypothesis"
        )
    return python


def package_folder(machine: Machine, environments: Path) -> Path | None:
    """The folder of a row's packages.

    Raises:
        SystemExit: it is not there; the message says how to make it.
    """
    if not machine.packages:
        return None
    folder = environments / "_".join(machine.packages)
    if not folder.is_dir():
        raise SystemExit(
            f"{folder} is not there. Make it:\n"
            f"  {sys.executable} -m pip install --no-deps --target {folder} {' '.join(machine.packages)}"
        )
    return folder


def run(
    machine: Machine, python: Path, log: Path, folder: Path | None = None, tests: list[str] | None = None
) -> dict[str, object]:
    """The row's result: counts as pytest closes with them, the failures' names, CPU seconds, where, when, the commit.

    Args:
        folder: of the row's packages.
        tests: these only, in place of the row's own.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **machine.environment}
    if folder is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT)])
    # Workers have one thread each; the rows of threads are about that.
    workers = [] if "UNISD_TEST_THREADS" in machine.environment else ["-n", "2"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    with log.open("w") as file:
        code = subprocess.run(
            [
                str(python),
                "-m",
                "pytest",
                *workers,
                "-m",
                "not exhaustive",
                "--tb=short",
                "-rf",
                *(tests or machine.tests),
            ],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    text = log.read_text()
    closing = re.findall(r"^=*\s*((?:\d+ \w+(?:, )?)+) in [\d.]+s", text, re.MULTILINE)
    return {
        "name": machine.name,
        "tests": CALLED[machine.tests],
        "status": code,
        "counts": closing[-1] if closing else "no closing line",
        "failed": re.findall(r"^FAILED (\S+)", text, re.MULTILINE),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "commit": commit(),
        "on": surroundings(),
    }


def again(
    before: dict[str, object], machine: Machine, python: Path, log: Path, folder: Path | None
) -> dict[str, object]:
    """A row's result after its failures were run once more."""
    failed = list(before["failed"])  # type: ignore[call-overload]
    found = run(machine, python, log, folder, failed)
    still = found["failed"] or (failed if found["status"] else [])
    note = f"{before['counts']} at {before['commit']}; of the {len(failed)} that failed, {found['counts']}"
    return {**before, "status": found["status"], "counts": note, "failed": still, "commit": found["commit"]}


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def surroundings() -> str:
    """Where and when rows are run now, in a line."""
    import torch

    from unisd_kernels.processor import processor_name

    machine = f"{processor_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return f"{machine}; Python {platform.python_version()}, torch {torch.__version__}; {time.strftime('%Y-%m-%d')}"


def page(results: dict[str, dict[str, object]], order: list[str]) -> str:
    """docs/machines.md."""
    lines = [
        "# Other machines, on one",
        "",
        "Written by `make machines`, which is not part of `make test`; scripts/machines.py says what a row stands for.",
    ]
    known = [results[name] for name in order if name in results]
    for place in dict.fromkeys(row["on"] for row in known):
        lines += ["", f"{place}:", "", "| as if | tests | result | commit |", "|---|---|---|---|"]
        for row in known:
            if row["on"] == place:
                failed = "".join(f"; `{each}`" for each in row["failed"])  # type: ignore[attr-defined]
                lines.append(f"| {row['name']} | {row['tests']} | {row['counts']}{failed} | {row['commit']} |")

    def folders(names: tuple[str, ...]) -> str:
        return ", ".join(f"`{name}`" for name in names)

    more = tuple(name for name in TESTS if name not in KERNELS)
    lines += [
        "",
        f'"Kernels": {folders(KERNELS)}. "All that compute": also {folders(more)}. "Triton\'s": {folders(TRITON)}. '
        f'"With models": {folders(MODELS)}. Skipped tests need a GPU, or a model that `make demo` fetches.',
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="rows whose name contains one of these; the others stay")
    parser.add_argument("--failed", action="store_true", help="of each row only what failed the last time")
    parser.add_argument("--list", action="store_true", help="print the rows' names")
    parser.add_argument("--torch", nargs="*", default=["2.10.0", "2.15.0"], help="the ends of torch's window")
    parser.add_argument(
        "--environments", type=Path, default=FOLDER, help="where the environments of --torch and the packages are"
    )
    options = parser.parse_args()
    rows = machines(options.torch)
    if options.list:
        print("\n".join(row.name for row in rows))
        return 0
    chosen = [row for row in rows if not options.only or any(part in row.name for part in options.only)]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.failed:
        chosen = [row for row in chosen if results.get(row.name, {}).get("failed")]
    # What is missing is said before anything runs.
    parts = [(python_of(row, options.environments), package_folder(row, options.environments)) for row in chosen]
    for number, (row, (python, folder)) in enumerate(zip(chosen, parts, strict=True), start=1):
        print(f"[{number}/{len(chosen)}] {row.name} ...", flush=True)
        log = FOLDER / (re.sub(r"[^\w.=-]+", "_", row.name) + ".txt")
        before = results.get(row.name)
        results[row.name] = again(before, row, python, log, folder) if options.failed else run(row, python, log, folder)
        found = results[row.name]
        print(f"    {found['counts']}, {found['cpu_seconds']} s of CPU, {found['minutes']} min", flush=True)
        for each in found["failed"]:
            print(f"    FAILED {each}", flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(page(results, [each.name for each in rows]))
    return int(any(results[row.name]["status"] for row in chosen))


if __name__ == "__main__":
    sys.exit(main())
