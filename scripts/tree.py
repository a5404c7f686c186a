"""Write the tree of docs/design.md: every file, with what it says of itself in its first line.

    python scripts/tree.py            write it
    python scripts/tree.py --check    fail where it is not what the files say

A Python file says it in its docstring, a C++ file in its first comment, a folder in its `__init__.py` or below.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "design.md"
BEGIN, END = "<!-- tree: begin (python scripts/tree.py) -->", "<!-- tree: end -->"
ROOMS = ("unisd_kernels", "csrc", "unisd", "bench", "tests", "scripts")
LONGEST = 96  # characters of what a file says
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh", ".sh")
# Folders without a file that could say it.
FOLDERS = {
    "unisd_kernels": "The kernels; needs torch only.",
    "csrc": "C++ for the CPU, CUDA for the moving average; one library for every Python and torch of the window.",
    "csrc/cpu": "Kernels on pointers, a table of them for each instruction set; the *_ops.cpp put torch around.",
    "csrc/cuda": "The moving average in one launch.",
    "unisd": "The trainer: TRL, transformers, PEFT.",
    "bench": "Benchmarks; not in the wheel.",
    "bench/results": "Measurements, with raw samples, machine and versions.",
    "tests": "One folder a subject; named here are the files that are no tests themselves.",
    "tests/bench": "Benchmarks, pages and plots.",
    "tests/benchmarks": "The six benchmarks and more, in their original formats.",
    "tests/build": "Wheels, the CUDA build, sanitizers.",
    "tests/certified": "Scores from int8 products, their bounds, and what is scored again.",
    "tests/cli": "The command line as a user types it.",
    "tests/compare": "Runs side by side.",
    "tests/data": "Tasks and their generators.",
    "tests/docs": "README and docs/ are what the code says.",
    "tests/evaluation": "Generation, perplexity, retention, reports.",
    "tests/fuzz": "Random calls of every operation against an oracle that shares no code with it.",
    "tests/gpu": "Everything that needs a GPU.",
    "tests/heads": "Heads of some 180 model classes.",
    "tests/ops": "The public operations, and the C++ kernels.",
    "tests/reference": "The dense definitions, by gradcheck and by hand.",
    "tests/scoring": "What a reply is worth, and intervals.",
    "tests/sweep": "Many runs by one command.",
    "tests/tasks": "Kinds of task, their views and negatives; the sandbox for code.",
    "tests/trainer": "The trainer on tiny models.",
    "tests/triton": "Triton's kernels, interpreted and compiled, without a GPU.",
    "scripts": "Commands for developers.",
}


def files() -> list[Path]:
    """The files of the rooms that git knows or would, in order."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *ROOMS]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    found = (Path(name) for name in sorted(set(listed)))  # git lists what is not yet added first
    return [path for path in found if path.suffix in SUFFIXES and (ROOT / path).exists() and is_named(path)]


def is_named(path: Path) -> bool:
    return path.name != "__init__.py" and not (path.parts[0] == "tests" and path.name.startswith("test_"))


def says(path: Path) -> str:
    """The first sentence of a file about itself."""
    text = (ROOT / path).read_text()
    if path.suffix == ".py":
        about = ast.get_docstring(ast.parse(text)) or ""
    else:
        mark = "#" if path.suffix == ".sh" else "//"
        lines = [line for line in text.splitlines() if not line.startswith("#!")]
        about = "\n".join(re.match(rf"{mark} ?(.*)", line)[1] for line in _leading(lines, mark))
    first = " ".join(about.split("\n\n")[0].split())
    return _short(re.split(r"(?<=[a-z0-9)`\]_])\. (?=[A-Z`0-9])", first)[0].rstrip("."))


def _short(sentence: str) -> str:
    """A sentence that is too long for a line, up to a place where it may end."""
    while len(sentence) > LONGEST:
        cut = max(sentence.rfind(mark) for mark in (": ", "; ", ", ", " ("))
        if cut <= 0:
            break
        sentence = sentence[:cut]
        if sentence.count("(") > sentence.count(")"):
            sentence = sentence[: sentence.rindex(" (")]
    return sentence


def _leading(lines: list[str], mark: str) -> list[str]:
    """The comment a file begins with."""
    comment = []
    for line in lines:
        if not line.startswith(mark):
            break
        comment.append(line)
    return comment


def tree() -> str:
    """The block between the marks."""
    every = files()
    folders = {parent for path in every for parent in path.parents if parent != Path(".")}
    lines = []

    def walk(folder: Path, depth: int) -> None:
        package = folder / "__init__.py"
        about = FOLDERS.get(str(folder)) or (says(package) if (ROOT / package).exists() else "")
        lines.append(_line(f"{folder.name}/", about.rstrip("."), depth))
        inside = [path for path in every if path.parent == folder]
        width = max((len(path.name) for path in inside), default=0)
        for path in inside:
            lines.append(_line(path.name, says(path), depth + 1, width))
        for child in sorted(path for path in folders if path.parent == folder):
            walk(child, depth + 1)

    for room in ROOMS:
        walk(Path(room), 0)
    return "\n".join((BEGIN, "", "```text", *lines, "```", "", END))


def _line(name: str, about: str, depth: int, width: int = 0) -> str:
    return f"{'  ' * depth}{name:<{width}}  {about}".rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail where the page is stale")
    options = parser.parse_args()
    before = PAGE.read_text()
    head, rest = before.split(BEGIN)
    after = head + tree() + rest.split(END)[1]
    if options.check:
        if before != after:
            print(f"{PAGE.relative_to(ROOT)}: the tree is not what the files say; run python scripts/tree.py")
        return int(before != after)
    PAGE.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
