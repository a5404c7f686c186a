"""One command line: `python -m bench COMMAND ...`, also `unisd bench COMMAND ...`. Without a command word: `run`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from unisd.cli.errors import CommandError, run, wants_traceback
from unisd.cli.parser import nearest

DEFAULT = "run"
# Name -> module with `main(arguments) -> exit status`, and a line of `--help`.
COMMANDS = {
    "run": ("bench.measuring.run", "cases with every peer: time, memory, error; the default"),
    "suite": ("bench.measuring.suite", "many cases within a deadline, most important first; can be resumed"),
    "scaling": ("bench.studies.scaling", "time and memory against N, V, H and K, with fitted exponents"),
    "figures": ("bench.studies.figures", "everything docs/benchmarks.md says of a CPU, into its machine's folder"),
    "repeat": ("bench.studies.repeat", "the same figures an hour apart, within a spread fixed beforehand or not"),
    "threads": ("bench.studies.threads", "few and many threads, one core, few rows, against the floor of each"),
    "steps": ("bench.studies.steps", "whole training steps of every preset, ours and dense"),
    "pooled-steps": ("bench.studies.pooled_steps", "steps whose auxiliary contexts come from a pool of fixed sets"),
    "recipes": ("bench.studies.recipes", "every recipe on real rows, from the file to the falling loss"),
    "family": ("bench.studies.family", "another family of models: evaluated, trained, evaluated"),
    "preparation": ("bench.studies.preparation", "time and memory of preparing many rows"),
    "study": (
        "bench.studies.study",
        "methods against each other on a small model: scores, drift, cost; can be resumed",
    ),
    "scorers": ("bench.studies.scorers", "gold and shuffled answers of the benchmarks, scored"),
    "rollouts": ("bench.studies.rollouts", "sampling through a LoRA adapter against merged weights"),
    "ema": ("bench.studies.ema", "the moving average: time, and error after a thousand steps"),
    "numerics": ("bench.studies.numerics", "the digits of a small divergence"),
    "certificate": ("bench.studies.certificate", "how sure int8 scores of the views make the agreement weights"),
    "mixtures": ("bench.studies.mixtures", "a teacher made of K views: time against K, and digits"),
    "tensor-parallel": ("bench.studies.tensor_parallel", "a head in shards: bytes and messages, by formula"),
    "ceilings": ("bench.roofline.ceilings", "this device's copy bandwidth and product rate"),
    "expected": ("bench.roofline.expected", "times on an accelerator from counts, beside measured ones"),
    "narrow-views": ("bench.roofline.narrow_views", "views scored by 8-bit products on a GPU, by count"),
    "tuning": ("bench.roofline.tuning", "every tile shape of the product kernels, timed on a GPU"),
    "products": ("bench.roofline.products", "rates of the library's products at the rows of a chunk, on a GPU"),
    "kernels": ("bench.roofline.kernel_times", "where the time of a step goes, kernel by kernel, on a GPU"),
    "ahead-of-time": ("bench.roofline.ahead_of_time", "what the compiler makes of the kernels; needs no GPU"),
    "tables": ("bench.report.tables", "a result file as tables, and what it left out"),
    "plots": ("bench.report.plots", "result files as plots"),
    "compare": ("bench.report.compare", "whether two results agree within their spread"),
    "report": ("bench.report.pages", "docs/benchmarks.md and README.md's tables from the results"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {description}" for name, (_, description) in COMMANDS.items()]
    head = "usage: python -m bench [COMMAND] [options]"
    return "\n".join([head, "", *lines, "", "python -m bench COMMAND --help says more."])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status.

    Raises:
        CommandError: a mistake in what was given.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["-h"], ["--help"]):
        print(usage())
        return 0
    name = DEFAULT if not given or given[0].startswith("-") else given.pop(0)
    if name not in COMMANDS:
        raise CommandError(f"there is no command {name!r}{nearest(name, COMMANDS) or '; --help lists them'}")
    # Imported here: most commands need only some of the packages.
    return importlib.import_module(COMMANDS[name][0]).main(given)


if __name__ == "__main__":
    traceback, rest = wants_traceback(sys.argv[1:])
    sys.exit(run("python -m bench", lambda: main(rest), traceback=traceback))
