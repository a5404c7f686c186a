"""`python -m bench report`: writes docs/benchmarks.md, docs/study.md with its figure, README.md's tables and its
picture, from the files in bench/results: one section for each machine, whose folder there is named after its processor.

Nothing of it is typed: a figure is in a result file or nowhere. In README.md a table stands between
`<!-- figures: NAME -->` and `<!-- end of figures -->`. `--check` writes nothing and fails where a page is not what the
results say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.parser import command_parser
from bench.report import machine_page, peers_figure, plots
from bench.report import readme as readme_tables
from bench.report import study as study_page
from bench.report.contents import contents
from bench.report.provenance import where
from bench.studies.study_methods import PARTS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
PAGE, STUDY, README = Path("docs") / "benchmarks.md", Path("docs") / "study.md", Path("README.md")
FIGURES = Path("docs") / "figures"

INTRODUCTION = """# Benchmarks

Written by `python -m bench report` from the files in `bench/results`, which hold the raw samples; a test fails if this
page and they differ. `make figures` measures everything of the CPU that it runs on, into a folder named after it, and
so gives it a section here; `python -m bench --help` lists the commands.

## How a figure is made

Peers take turns in every round of one process, in an order that turns round, after one uncounted call, each time with
another set of inputs than the last-level cache could hold. "time / floor" is the median over rounds of the time within
a round as a multiple of the *floor*: the bare matrix products that the operation cannot do without, at full size, into
a buffer that exists already (in chunks of 8192 rows where that would exceed 4 GiB), by the library that stands beside
the machine, in the operands' dtype. A second floor on a CPU does not depend on a library: "fma peak" does as many
multiply-adds on registers alone, on as many threads, in turn with the peers, and "of the FMA peak" is its time over a
peer's. Where operands are bfloat16, "gemm floor float32" is what the products of float32 ones take. The spread is the
0.2 and the 0.8 quantile of the rounds. On a GPU a time is between two CUDA events, over several repetitions where a
step is shorter than 2 ms; on a CPU a sample lasts a second or ten steps. Milliseconds, medians with the same quantiles,
are printed for accelerators only: those of one CPU say little of another's. "Extra peak memory" is what one step adds
to what the process held before: by torch's own counter on a GPU; on a CPU by the resident set of a process that runs
this peer alone, so that nobody's leftovers count (in results before 2026-11-26 all peers shared one process). Errors
are relative, by Frobenius norms, against float64 on the first sequence; one that is more than twice that of the dense
formulas in the operands' dtype with float32 statistics, plus 1e-5, stands with its limit. What a peer cannot do, or
does more, is in its note and in its file of `bench/peers`; it is compared on what it can do.

    make bench                                                       # the forward KL on this machine's CPU, six minutes
    make figures                                                     # all of its section here; figures-steps: of a step
    python -m bench repeat --run 1                                   # and an hour later --run 2: the same again?
    python -m bench --case unisd_star --device auto --peers all      # any case; --output FILE.json or .csv
    python -m bench --case kl --against FILE.json --strict           # did it become slower, or wrong?
    pytest bench/ --benchmark-only --bench-case kl scoring           # the same peers under pytest-benchmark
"""


def load(name: str) -> dict[str, Any] | None:
    """A result that is of no one machine's folder: a GPU's, the demo's, the study's."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _accelerators() -> str:
    names = sorted(path.stem for path in RESULTS.glob("gpu*.json"))
    if not names:
        return (
            "Nothing has been measured on a GPU yet. `bash scripts/gpu_suite.sh` measures it in one call; what the "
            "counts let expect is in [gpu.md](gpu.md)."
        )
    parts = []
    for name in names:
        result = load(name)
        assert result is not None
        environment = result["environment"]
        parts.append(
            f"### {environment['device']}, {name}, {environment['date'][:10]}\n\n{machine_page.case_tables(result)}\n\n"
            f"`bench/results/{name}.json`: {where(environment)}"
        )
    return "\n\n".join(parts)


def page() -> str:
    """docs/benchmarks.md."""
    introduction, how = INTRODUCTION.strip().split("\n\n## ", 1)
    sections = [
        f"## {how}",
        *(machine_page.page(folder, RESULTS) for folder in machine_page.folders(RESULTS)),
        "## GPUs",
        _accelerators(),
        "## Vocabulary-parallel heads, by count",
        "Bytes on the wire, messages and FLOPs for 2 to 64 ranks: [tensor-parallel.md](tensor-parallel.md).",
    ]
    text = "\n\n".join(sections)
    return f"{introduction}\n\n{contents(text)}\n\n{text}\n"


def main_table() -> str:
    """README.md: the UniSD* loss on every machine's CPU."""
    return readme_tables.loss_tables(machine_page.folders(RESULTS))


def demo_table() -> str:
    """README.md: before and after the demo."""
    result = load("demo_cpu")
    assert result is not None
    return readme_tables.demo_table(result)


BLOCKS: dict[str, Callable[[], str]] = {"unisd_star": main_table, "demo": demo_table}
_BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.S)


def readme(text: str) -> str:
    """README.md's text with every block of figures made anew."""
    return _BLOCK.sub(lambda found: f"{found[1]}\n{BLOCKS[found[2]]()}\n\n{found[3]}", text)


def pages() -> dict[Path, str]:
    return {
        PAGE: page(),
        **study_pages(),
        README: readme((ROOT / README).read_text()),
        FIGURES / peers_figure.FIGURE: picture(),
    }


def picture() -> str:
    """README.md's picture, of the machine measured last."""
    results = [machine_page.load(folder, "float32") for folder in machine_page.folders(RESULTS)]
    latest = max((result for result in results if result), key=lambda result: result["environment"]["date"])
    return peers_figure.figure(latest, "unisd_star_cpu", "forward KL")


def study_pages() -> dict[Path, str]:
    """docs/study.md and its figure."""
    parts = {part: load(f"study_{part}_cpu") or {} for part in PARTS}
    study = parts["study"]
    mixed = parts.get("mixtures")
    text = study_page.page(parts, where(study["environment"]), where(mixed["environment"]) if mixed else "")
    return {STUDY: text, FIGURES / study_page.FIGURE: study_page.figure(study["runs"])}


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("report", __doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where a page differs")
    parser.add_argument("--plots", action="store_true", help="draw docs/figures of every machine too")
    options = parser.parse_args(arguments)
    check = options.check
    if options.plots:
        for folder in machine_page.folders(RESULTS):
            for name, figure in machine_page.plots_of(folder).items():
                plots.save(figure, ROOT / FIGURES / folder.name / name)
    different = {path: text for path, text in pages().items() if not _same(ROOT / path, text)}
    for path, text in different.items():
        if not check:
            (ROOT / path).write_text(text)
        print(f"{path} {'is not what the results say' if check else 'written'}")
    return int(check and bool(different))


def _same(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text
