"""`python -m bench report`: writes docs/benchmarks.md, docs/study.md with its figure, and README.md's tables, from the
files in bench/results.

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
from bench.records.verdict import agree, same_rows
from bench.report import compare, tables
from bench.report import study as study_page
from bench.studies import ema, numerics, scaling, steps
from bench.studies.study_methods import PARTS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
PAGE, STUDY, README = Path("docs") / "benchmarks.md", Path("docs") / "study.md", Path("README.md")
FIGURES = Path("docs") / "figures"

INTRODUCTION = """# Benchmarks

Written by `python -m bench report` from the files in `bench/results`, which hold the raw samples; a test fails if this
page and they differ. `make figures` measures everything of a CPU anew; `python -m bench --help` lists the commands.

## How a figure is made

Peers take turns in every round of one process, in an order that turns round, after one uncounted call, each time with
another set of inputs than the last-level cache could hold. "time / floor" is the median over rounds of the time within
a round as a multiple of the *floor*: the bare matrix products that the operation cannot do without, at full size, into
a buffer that exists already (in chunks of 8192 rows where that would exceed 4 GiB). The spread is the 0.2 and the 0.8
quantile of the rounds. On a GPU a time is between two CUDA events, over several repetitions where a step is shorter
than 2 ms; on a CPU a sample lasts a second or ten steps. Milliseconds, medians with the same quantiles, are printed for
accelerators only: those of one CPU say little of another's. "Extra peak memory" is what one step adds to what the
process held before: by torch's own counter on a GPU, by the process's resident set on a CPU. Errors are relative, by
Frobenius norms, against float64 on the first sequence; one that is more than twice that of the dense formulas in the
operands' dtype with float32 statistics, plus 1e-5, stands with its limit. What a peer cannot do, or does more, is in
its note and in its file of `bench/peers`; it is compared on what it can do.

    make bench                                                       # the forward KL on this machine's CPU, six minutes
    python -m bench --case unisd_star --device auto --peers all      # any case; --output FILE.json or .csv
    python -m bench --case kl --against FILE.json --strict           # did it become slower, or wrong?
    pytest bench/ --benchmark-only --bench-case kl scoring           # the same peers under pytest-benchmark
"""


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def machine(environment: dict[str, Any]) -> str:
    """One paragraph: the command, where and with what it ran."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    device = environment["device"]
    if device == "cpu":
        where = f"{environment['cpu']}, {environment['instruction_set']}, {environment['threads']} threads"
    else:
        where = f"{device}, driver {environment['driver']}, CUDA {environment['cuda']}"
    when = environment.get("date", "")[:10]
    # Files of before there was one command line name its modules.
    command = environment["command"].replace("python -m bench.", "python -m bench ")
    return (
        f"`{command}`; {where}; Python {environment['python']}, {versions}; commit "
        f"{environment['commit']}{', ' + when if when else ''}."
    )


NOT_MEASURED = "Not measured yet."


def case_tables(name: str) -> str:
    """Every case of a result file."""
    return study(name, lambda result: "\n\n".join(tables.case_tables(result["rows"])))


def study(name: str, render: Callable[[dict[str, Any]], str]) -> str:
    """A result as `render` shows it, and where it comes from."""
    result = load(name)
    if result is None:
        return NOT_MEASURED
    return f"{render(result)}\n\n`bench/results/{name}.json`: {machine(result['environment'])}"


def two_runs(first: str, second: str) -> str:
    """Whether two results of the same command agree."""
    a, b = load(first), load(second)
    if a is None or b is None:
        return NOT_MEASURED
    ended = [result["environment"]["date"][:16].replace("T", " ") for result in (a, b)]
    pairs = same_rows(a["rows"], b["rows"])
    agreeing = sum(agree(*pair) for pair in pairs)
    return (
        f"The same command twice, ended {ended[0]} and {ended[1]} UTC: {agreeing} of {len(pairs)} ratios agree: their "
        f"ranges meet.\n\n{compare.comparison(pairs)}\n\n"
        f"`python -m bench compare bench/results/{first}.json bench/results/{second}.json`: "
        f"{machine(b['environment'])}"
    )


def training_steps(result: dict[str, Any]) -> str:
    """Whole steps, and what is in one."""
    notes = {row["peer"]: row["note"] for row in result["rows"]}
    lines = [f"- {peer}: {note}." for peer, note in notes.items()]
    return (
        f"All that the trainer does for one optimizer step on {result['rows'][0]['case'].removeprefix('steps.')}, the "
        f"completions the same for all; then with the sampling of them. `plain` is plain self-distillation "
        "(called sdft in results before 2026-11-25).\n\n"
        f"{steps.table(result['rows'])}\n\n" + "\n".join(lines)
    )


def _figures(*names: str) -> str:
    return "\n\n".join(f"![{name.replace('_', ' ')}](figures/{name}.png)" for name in names)


def _accelerators() -> str:
    names = sorted(path.stem for path in RESULTS.glob("gpu*.json"))
    if names:
        return "\n\n".join(case_tables(name) for name in names)
    return (
        "Nothing has been measured on a GPU yet. `bash scripts/gpu_suite.sh` measures it in one call; what the counts "
        "let expect is in [gpu.md](gpu.md)."
    )


def page() -> str:
    """docs/benchmarks.md."""
    sections = [
        INTRODUCTION.strip(),
        "## A CPU, every peer",
        case_tables("cpu"),
        "## The same on a model's hidden states",
        "SmolLM2-135M's, of right replies to procedural tasks: under the bare prompt (student), with a demonstration "
        "(teacher), with a wrong one (negative), with others (auxiliary).",
        case_tables("cpu_smollm2"),
        "## Other heads",
        case_tables("cpu_heads"),
        "## Two runs an hour apart",
        "The spread that is stated: the quantiles, and 10% of a ratio either way at least, which is what this shared "
        "machine drifts by; on an accelerator 5%.",
        two_runs("cpu_run_1", "cpu_run_2"),
        "## Scaling",
        study("cpu_scaling", scaling.table),
        _figures("scaling_time", "scaling_memory"),
        "## Against the machine's ceilings",
        "FLOPs of the floor over the time of each peer, at the FLOPs a byte that the least traffic allows.",
        _figures("roofline"),
        "## A whole training step: the reliability tax",
        study("cpu_steps", training_steps),
        "## The moving average",
        study("ema_cpu", ema.tables),
        "## The digits of a small divergence",
        study("numerics_cpu", numerics.table),
        "## GPUs",
        _accelerators(),
        "## Tensor parallelism, on paper",
        "Bytes on the wire and FLOPs for 2 to 64 ranks: [tensor-parallel.md](tensor-parallel.md).",
    ]
    return "\n\n".join(sections) + "\n"


def main_table() -> str:
    """README.md: the UniSD* loss on a CPU, only what has a figure."""
    result = load("cpu")
    assert result is not None
    rows = [row for row in result["rows"] if row["case"] == "unisd_star_cpu" and "failure" not in row]
    lines = ["| divergence | peer | time / floor | extra peak memory | gradient error |", "|---" * 5 + "|"]
    for row in rows:
        memory = f"{row['extra_peak_bytes'] / 1e6:.0f} MB" if "extra_peak_bytes" in row else ""
        error = f"{row['gradient_error']:.0e}" if "gradient_error" in row else ""
        lines.append(f"| {row['divergence']} | {row['peer']} | {row['ratio_to_floor']:.2f} | {memory} | {error} |")
    return "\n".join([*lines, "", machine(result["environment"])])


def demo_table() -> str:
    """README.md: before and after the demo."""
    result = load("demo_cpu")
    assert result is not None
    lines = [
        "| seed | perplexity of the correct reply | accuracy | KL from the base on chat | minutes |",
        "|---" * 5 + "|",
    ]
    for run in result["runs"]:
        before, after = run["before"], run["after"]
        lines.append(
            f"| {run['seed']} | {before['perplexity']:.3f} -> {after['perplexity']:.3f} "
            f"| {before['accuracy']:.0%} -> {after['accuracy']:.0%} "
            f"| {run['retention']['kl']:.3f} nats a token | {run['minutes']:.1f} |"
        )
    return "\n".join(lines)


BLOCKS: dict[str, Callable[[], str]] = {"unisd_star": main_table, "demo": demo_table}
_BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.S)


def readme(text: str) -> str:
    """README.md's text with every block of figures made anew."""
    return _BLOCK.sub(lambda found: f"{found[1]}\n{BLOCKS[found[2]]()}\n\n{found[3]}", text)


def pages() -> dict[Path, str]:
    return {PAGE: page(), **study_pages(), README: readme((ROOT / README).read_text())}


def study_pages() -> dict[Path, str]:
    """docs/study.md and its figure."""
    parts = {part: load(f"study_{part}_cpu") or {} for part in PARTS}
    study = parts["study"]
    text = study_page.page(parts, machine(study["environment"]))
    return {STUDY: text, FIGURES / study_page.FIGURE: study_page.figure(study["runs"])}


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("report", __doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where a page differs")
    check = parser.parse_args(arguments).check
    different = {path: text for path, text in pages().items() if not _same(ROOT / path, text)}
    for path, text in different.items():
        if not check:
            (ROOT / path).write_text(text)
        print(f"{path} {'is not what the results say' if check else 'written'}")
    return int(check and bool(different))


def _same(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text
