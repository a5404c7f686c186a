"""`python -m bench study -o runs/study`: does self-distillation help a small model, and what does it cost?

    python -m bench study -o runs/study --cos-e cos_e_train.jsonl --cos-e-test cos_e_validation.jsonl

SmolLM2-135M-Instruct with LoRA on this machine's CPU, two runs side by side on a thread each. Parts:

    study        base, SFT, GKD, SDFT and UniSD* with three seeds, each mechanism alone with one, on procedural tasks
                 and on CoS-E: scores, drift, behaviour, cost
    why          UniSD* with SDFT's divergence: what of their difference is its direction
    diagnostic   base, SFT, GKD and UniSD* on the procedural diagnostic, by number of steps
    budget       a learning rate that collapses, without and with a drift budget
    mixtures     teachers that are a mixture of views, alone and with SDFT's divergence

The same command goes on where it was killed: what is finished is not done again. `--results DIR` writes what was found
as study_*_cpu.json, from which `python -m bench report` makes docs/study.md; with `--report` it runs nothing and takes
what is finished.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from bench.parser import command_parser
from bench.records import results_file
from bench.studies import study_jobs
from bench.studies.study_methods import PARTS
from bench.studies.study_plan import Planned, Sizes, planned
from bench.studies.study_results import collected
from unisd.cli.errors import CommandError
from unisd.cli.parser import CommandParser, positive
from unisd.compare.runs import EVALUATIONS
from unisd.prepare.folder import is_prepared
from unisd.sweep import Sweep
from unisd.sweep.cells import FINISHED, finished
from unisd_kernels.files import write_json


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(list(arguments))
    sizes = Sizes(**{each.name: getattr(options, each.name) for each in fields(Sizes) if hasattr(options, each.name)})
    root: Path = options.output
    if {"study", "mixtures"} & set(options.part) and not options.report:
        _check_files(options)
    if options.report and options.results is None:
        raise CommandError("--report writes nothing without --results DIR")
    work = [
        (part, run)
        for part in PARTS
        if part in options.part
        for run in planned(part, sizes, root / "cos_e", options.cos_e_test or Path())
    ]
    todo = [(part, run) for part, run in work if finished(_folder(run, root)) is None]
    print(f"{len(work)} runs, {len(work) - len(todo)} of them finished before; {sizes}", flush=True)
    failed: list[str] = []
    if todo and not options.report:
        study_jobs.warm()
        say = partial(print, flush=True)
        if any(run.cell is not None and run.cell.data == str(root / "cos_e") for _, run in todo):
            failed += _prepare(options.cos_e, root, sizes, say)
        jobs = [("/".join(filter(None, (part, run.variant, run.name))), partial(_one, run, root)) for part, run in todo]
        failed = failed or study_jobs.run_side_by_side(jobs, options.jobs, say)
    if failed:
        print(f"{len(failed)} failed: {', '.join(failed)}; the same command tries them again", file=sys.stderr)
    for part in options.part if options.results else ():
        runs = [run for of, run in work if of == part and finished(_folder(run, root)) is not None]
        file = options.results / f"study_{part}_cpu.json"
        results_file.write_json(file, collected(part, runs, root, sizes, _typed(options)))
        print(f"{len(runs)} runs: {file}")
    return int(bool(failed))


def _one(run: Planned, root: Path) -> int:
    """Exit status of a run and its evaluations."""
    folder = _folder(run, root)
    if run.cell is not None:
        said: list[str] = []
        sweep = Sweep(run.folder(root), run.train, run.evaluations, say=said.append, launch=study_jobs.launch)
        (outcome,) = sweep.run([run.cell])
        if outcome.status == "failed":
            print(said[-1], flush=True)
        return int(outcome.status == "failed")
    log = run.folder(root) / "logs" / f"{run.name}.log"
    for words in run.evaluations:
        if study_jobs.launch(["eval", *words, "-o", str(folder / EVALUATIONS)], log) != 0:
            print(f"{run.name}: see {log}", flush=True)
            return 1
    write_json(folder / FINISHED, {"base": True})
    return 0


def _folder(run: Planned, root: Path) -> Path:
    return run.folder(root) / run.name


def _prepare(file: Path, root: Path, sizes: Sizes, say: partial[None]) -> list[str]:
    """Rows of CoS-E with every view, once for all runs."""
    folder, rows = root / "cos_e", sizes.steps * sizes.batch_size
    if is_prepared(folder):
        return []
    words = ["prepare", str(file), "-o", str(folder), "--limit", str(rows), "--negatives", "other"]
    words += ["--num_auxiliary", "2"]
    name = f"rows of {file.name}"
    return study_jobs.run_side_by_side(
        [(name, lambda: study_jobs.launch(words, root / "logs" / "prepare.log"))], 1, say
    )


def _typed(options: Any) -> str:
    """The command, without the folders of this machine."""
    files = (("--cos-e", options.cos_e), ("--cos-e-test", options.cos_e_test))
    words = ["python -m bench study -o runs/study", *(f"{flag} {file.name}" for flag, file in files if file)]
    return " ".join(words if options.dtype == Sizes.dtype else [*words, f"--dtype {options.dtype}"])


def _check_files(options: Any) -> None:
    for name in ("cos_e", "cos_e_test"):
        file = getattr(options, name)
        flag = "--" + name.replace("_", "-")
        if file is None or not file.is_file():
            what = "is missing" if file is None else f"{file}: there is no such file"
            raise CommandError(
                f"{flag} {what}: give a file of CoS-E in its original format, or --part diagnostic budget"
            )


def _parser() -> CommandParser:
    parser = command_parser("study", __doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/study"), help="folder of all runs")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cos-e", type=Path, help="file of CoS-E to train on")
    parser.add_argument("--cos-e-test", type=Path, help="file of CoS-E to evaluate on")
    parser.add_argument("--jobs", type=positive, default=2, help="runs side by side, a thread each")
    parser.add_argument("--results", type=Path, help="folder for study_*_cpu.json")
    parser.add_argument("--report", action="store_true", help="run nothing: write the results of what is finished")
    for name in ("steps", "items", "asked", "seeds", "budget_steps"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive, default=getattr(Sizes, name))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=Sizes.dtype, help="of the base's weights")
    return parser
