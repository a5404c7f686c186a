"""`unisd eval`: how well a model does its tasks, and what training changed elsewhere.

    unisd eval procedural --model runs/demo/adapter --steps 1 2 3 --count 30
    unisd eval diagnostic --model runs/mine --steps 5 10 20 --look-back 3
    unisd eval retention --model runs/mine              # fixed answers to chat
    unisd eval drift --model runs/mine                  # both models' own chat
    unisd eval drift --model runs/mine --dataset cos_e  # and a task's prompts
    unisd eval behaviour --model runs/mine              # refusals, facts
    unisd eval procedural drift --model runs/mine -o runs/mine/eval  # one load
    unisd eval scienceqa cos_e --model runs/mine        # benchmarks

Benchmarks have options of their own: `unisd eval scienceqa --help`.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from unisd.benchmarks import benchmarks
from unisd.cli.device import choose_device
from unisd.cli.dtype import DTYPES, choose_dtype
from unisd.cli.errors import CommandError, setting_up
from unisd.cli.parser import CommandParser, natural, positive
from unisd.data.diagnostic import OPERATIONS, RANGES, DiagnosticSettings, diagnostic_tasks
from unisd.data.procedural import SPLITS, procedural_rows
from unisd.evaluation import evaluate_procedural, evaluate_retention
from unisd.evaluation.base import base_of
from unisd.evaluation.behaviour import evaluate_behaviour, load_items
from unisd.evaluation.diagnostic import evaluate_diagnostic
from unisd.evaluation.drift import DriftWithTask, evaluate_drift
from unisd.evaluation.files import write_result
from unisd.evaluation.task_prompts import TaskPrompts, task_prompts
from unisd.models import FETCHED, SMOLLM2, load_model
from unisd.peak_memory import peak_memory_gib

OWN = ("procedural", "diagnostic", "retention", "drift", "behaviour")
"""What is evaluated here; benchmarks have a command line of their own."""
_TASKS = ("procedural", "diagnostic")
_OF_DATASET = ("data", "count", "steps", "look_back", "split", "seed")
"""What `drift` reads only with --dataset."""
READ_BY = {
    **dict.fromkeys(("count", "steps", "look_back", "split", "seed"), (*_TASKS, "drift")),
    **dict.fromkeys(("dataset", "data", "max_new_tokens"), ("drift",)),
    "base": ("retention", "drift"),
    "values": ("diagnostic",),
    "operations": ("diagnostic",),
    "no_accuracy": ("procedural",),
    "probe": ("behaviour",),
}
"""Option -> the evaluations that read it."""


def main(arguments: list[str]) -> int:
    known = benchmarks()
    if any(word in known for word in arguments) and not any(word in OWN for word in arguments):
        return _of_benchmarks(arguments)
    parser = _parser([*OWN, *known])
    options = parser.parse_args(arguments)
    options.what = list(dict.fromkeys(options.what))
    of_known = [name for name in options.what if name in known]
    if of_known == options.what:  # and a value is called like one of ours
        return _of_benchmarks(arguments)
    if of_known:
        raise CommandError(f"{of_known[0]} is a benchmark, which has options of its own: use a second command, same -o")
    _refuse_idle(parser, options)
    _check_output(options)
    # Deprecations between the libraries underneath; nothing a reader of the scores could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    with setting_up():
        drawn = _drawn(options) if "diagnostic" in options.what else None
        probe = None if options.probe is None else load_items(options.probe)
        device = choose_device(options.device)
        loading = {
            "dtype": choose_dtype(options.dtype, device),
            "device": device,
            "attn_implementation": options.attn_implementation,
            "trust_remote_code": options.trust_remote_code,
        }
        model, tokenizer = load_model(options.model, adapter=options.adapter, **loading)
        base = None if options.base is None else load_model(options.base, **loading)[0]
        if set(options.what) & set(READ_BY["base"]):
            base_of(model, base)  # refuses now what would be refused after the evaluations before it
        task = None if options.dataset is None else _task(options, tokenizer)
    print(f"{options.model} on {device}, {str(loading['dtype']).removeprefix('torch.')}", flush=True)
    for what in options.what:
        if len(options.what) > 1:
            print(f"{what}:")
        started = time.perf_counter()
        scores: Any
        if what == "procedural":
            rows = procedural_rows(
                options.count,
                seed=options.seed,
                split=options.split or "test",
                num_steps=options.steps or (1, 2, 3),
                look_back=options.look_back,
                num_auxiliary=0,
            )
            scores = evaluate_procedural(model, tokenizer, rows, accuracy=not options.no_accuracy)
        elif what == "diagnostic":
            scores = evaluate_diagnostic(model, tokenizer, diagnostic_tasks(options.count, drawn))
        elif what == "behaviour":
            scores = evaluate_behaviour(model, tokenizer, probe)
        elif what == "drift":
            drift: dict[str, Any] = {"base_model": base, "max_new_tokens": options.max_new_tokens}
            scores = evaluate_drift(model, tokenizer, **drift)
            if task is not None:
                on_task = evaluate_drift(model, tokenizer, task.prompts, golds=task.golds, **drift)
                scores = DriftWithTask(scores, task, on_task)
        else:
            scores = evaluate_retention(model, tokenizer, base_model=base)
        print(scores.table(), flush=True)
        file = options.output if options.folder is None else options.folder / f"{what}.json"
        if file is not None:
            _write(file, what, scores, options, time.perf_counter() - started, device)
            print(f"  {file}")
    return 0


def _write(
    file: Path, what: str, scores: Any, options: argparse.Namespace, seconds: float, device: torch.device
) -> None:
    """Scores, and every completion beside them."""
    read = [name for name, readers in READ_BY.items() if what in readers]
    if what == "drift" and options.dataset is None:
        read = [name for name in read if name not in _OF_DATASET]
    settings = {name: getattr(options, name) for name in read}
    if what in _TASKS:
        settings["split"] = options.split or "test"
    elif settings.get("data") is not None:
        settings["data"] = Path(options.data).name
    before = {
        "model": str(options.model),
        "adapter": options.adapter,
        "settings": {name: value.name if isinstance(value, Path) else value for name, value in settings.items()},
    }
    after = {"seconds": round(seconds, 1), "peak_memory_gib": round(peak_memory_gib(device), 3)}
    write_result(file, scores, before, after)


def _check_output(options: argparse.Namespace) -> None:
    """Raise CommandError for a file where a folder is meant, or the reverse."""
    if options.output is not None and options.folder is not None:
        raise CommandError("-o FOLDER and --output FILE are two names for one thing: give one of them")
    if options.output is not None and len(options.what) > 1:
        raise CommandError(
            f"--output is the file of one evaluation, and {len(options.what)} are asked for: give a folder with -o"
        )
    if options.folder is not None and options.folder.suffix == ".json":
        raise CommandError(f"-o {options.folder} is a folder, for NAME.json of each evaluation; --output is a file")


def _of_benchmarks(arguments: list[str]) -> int:
    from unisd.cli import evaluate_benchmarks  # which needs much that the others do not

    return evaluate_benchmarks.main(arguments)


def _drawn(options: argparse.Namespace) -> DiagnosticSettings:
    return DiagnosticSettings(
        seed=options.seed,
        split=options.split or "test",
        num_steps=tuple(options.steps or (5, 10)),
        look_back=options.look_back,
        values=options.values,
        operations=tuple(options.operations),
    )


def _task(options: argparse.Namespace, tokenizer: Any) -> TaskPrompts:
    return task_prompts(
        options.dataset,
        options.count,
        split=options.split,
        file=options.data,
        chats=getattr(tokenizer, "chat_template", None) is not None,
        seed=options.seed,
        num_steps=options.steps,
        look_back=options.look_back,
    )


def _refuse_idle(parser: CommandParser, options: argparse.Namespace) -> None:
    """Raise CommandError for an option of another evaluation."""
    for name, readers in READ_BY.items():
        if getattr(options, name) == parser.get_default(name):
            continue
        flag = name if name == "max_new_tokens" else name.replace("_", "-")
        reading = set(options.what) & set(readers)
        if not reading:
            raise CommandError(f"--{flag} has no effect with {', '.join(options.what)}")
        if reading == {"drift"} and options.dataset is None and name in _OF_DATASET:
            raise CommandError(f"--{flag} has no effect on drift without --dataset")


def _parser(names: list[str]) -> CommandParser:
    parser = CommandParser(prog="unisd eval", description=__doc__)
    parser.add_argument("what", nargs="+", choices=names, metavar="EVALUATION", help=", ".join(names))
    parser.add_argument(
        "--model", default=SMOLLM2, help=f"model id, {', '.join(FETCHED)}, local folder, or folder of a PEFT adapter"
    )
    parser.add_argument("--adapter", help="folder of a PEFT adapter to put on --model")
    parser.add_argument("--base", help="retention, drift: model to compare with (default: without adapter)")
    parser.add_argument("--device", default="auto", help="auto (CUDA if it is there, else the CPU), cpu, cuda, cuda:1")
    parser.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="of the weights; auto: bfloat16 on CUDA where it can, else float32",
    )
    parser.add_argument("--attn_implementation", "--attn-implementation", help="sdpa, eager, flash_attention_2, ...")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--max_new_tokens", type=positive, default=128, help="drift: longest completion")
    parser.add_argument("--dataset", help="drift: also a task: procedural, a benchmark, a file, a prepared folder")
    parser.add_argument("--data", help="drift: file of the benchmark that --dataset names, in its original format")
    parser.add_argument("--probe", type=Path, help="behaviour: items in place of the package's (JSON lines)")
    tasks = parser.add_argument_group("procedural, diagnostic, and drift with --dataset")
    tasks.add_argument("--count", type=positive, default=30, help="number of tasks")
    tasks.add_argument("--steps", type=positive, nargs="+", help="numbers of steps, in turn (1 2 3; diagnostic: 5 10)")
    tasks.add_argument("--look-back", type=positive, default=1, help="how far back operands may lie")
    tasks.add_argument("--split", choices=SPLITS, help="tasks to take (default: test)")
    tasks.add_argument("--seed", type=natural, default=0)
    tasks.add_argument("--values", choices=list(RANGES), default="small", help="diagnostic: range of the two inputs")
    tasks.add_argument(
        "--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), help="diagnostic: to draw from"
    )
    parser.add_argument("--no-accuracy", action="store_true", help="procedural: perplexity only (no generation)")
    parser.add_argument(
        "-o",
        dest="folder",
        type=Path,
        metavar="FOLDER",
        help="folder for NAME.json (scores) and NAME.jsonl (completions)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the same for one evaluation, by the name of its file"
    )
    return parser
