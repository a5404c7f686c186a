"""`unisd sweep`: presets x seeds x data by one command, one table and one page.

    unisd sweep --presets plain unisd_star sft --seeds 0 1 2 --dataset cos_e \\
        --eval "cos_e --limit 200" --eval "procedural drift --count 60" \\
        -o runs/sweep \\
        -- --model_name_or_path smollm2-135m-instruct --max_steps 200

Words after -- go to every `unisd train`. Each run is a process of its own. The same command again goes on where the
last was killed: what is finished is found, a run with checkpoints resumes. Where CUDA runs out of memory a run is made
again with half the micro-batch and twice the accumulation, and that is said. A run that fails does not end the others;
what it printed is in logs/.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from unisd.benchmarks import benchmarks
from unisd.cli.errors import CommandError, setting_up
from unisd.cli.evaluate import OWN
from unisd.cli.parser import CommandParser, natural
from unisd.compare import load_run, page
from unisd.presets import PRESETS
from unisd.sweep import Sweep, cells
from unisd.sweep.run import launch
from unisd.sweep.table import table
from unisd_kernels.files import replacing

_SET_HERE = ("--dataset", "--preset", "--seed", "--output_dir", "--overwrite_output_dir", "--resume")


def main(arguments: list[str]) -> int:
    place = arguments.index("--") if "--" in arguments else len(arguments)
    train = arguments[place + 1 :]
    options = _parser().parse_args(arguments[:place])
    for word in train:
        if word.partition("=")[0] in _SET_HERE:
            raise CommandError(f"{word.partition('=')[0]} is set by the sweep: leave it out behind --")
    evaluations = [_evaluation(words) for words in options.eval]
    if options.drift and any("drift" in words for words in evaluations):
        raise CommandError("--drift and drift in --eval are one evaluation: leave one out")
    with setting_up():
        runs = cells(options.dataset, options.presets, options.seeds)
    sweep = Sweep(options.output, train, evaluations, options.drift, launch=launch)
    outcomes = sweep.run(runs)
    text = table(runs, options.output)
    whole = [load_run(options.output / each.cell.name) for each in outcomes if each.status != "failed"]
    with replacing(options.output / "sweep.md") as new:
        new.write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\ntable: {options.output / 'sweep.md'}")
    if whole:
        with replacing(options.output / "compare.html") as new:
            new.write_text(page(whole, "A sweep"), encoding="utf-8")
        print(f"page: {options.output / 'compare.html'}")
    failed = [each for each in outcomes if each.status == "failed"]
    if failed:
        print(f"{len(failed)} of {len(outcomes)} runs failed; the same command tries them again")
    return 1 if failed else 0


def _evaluation(text: str) -> list[str]:
    """Words of `unisd eval`, refused now where they could only fail behind the first run."""
    words = shlex.split(text)
    names = [*OWN, *benchmarks()]
    if not words or words[0] not in names:
        raise CommandError(f"--eval {text!r} does not begin with an evaluation: {', '.join(names)}")
    for word in words:
        if word.partition("=")[0] in ("--model", "-o", "--output"):
            raise CommandError(f"{word.partition('=')[0]} is set by the sweep: leave it out of --eval {text!r}")
    return words


def _parser() -> CommandParser:
    parser = CommandParser(prog="unisd sweep", description=__doc__)
    parser.add_argument(
        "--presets",
        nargs="+",
        required=True,
        choices=list(PRESETS),
        metavar="PRESET",
        help="`unisd presets` lists them",
    )
    parser.add_argument("--seeds", nargs="+", type=natural, default=[42])
    parser.add_argument("--dataset", nargs="+", default=["procedural"], help="sources of rows, as for unisd train")
    parser.add_argument(
        "--eval",
        action="append",
        default=[],
        metavar="WORDS",
        help='of unisd eval, e.g. "cos_e --limit 200" or "procedural drift --count 60" (one load of the model); again '
        "for more",
    )
    parser.add_argument("--drift", action="store_true", help="also unisd eval drift")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the runs, the table and the page")
    return parser
