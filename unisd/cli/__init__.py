"""The command `unisd`: `prepare`, `show`, `train`, `eval`, `doctor`, ... Each lives in a module of its own."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from unisd.cli.errors import CommandError, run, wants_traceback
from unisd.cli.help import width, wrapped
from unisd.cli.parser import nearest

COMMANDS = {
    "prepare": ("unisd.cli.prepare", "make rows with every view from a file of questions and answers"),
    "show": ("unisd.cli.show", "what each model reads of a prepared row, in the terminal and as a page"),
    "train": ("unisd.cli.train", "train a model; settings from a YAML file and the command line"),
    "launch": ("unisd.cli.launch", "a command on several processes: DDP, FSDP2, ZeRO-2 or ZeRO-3, by shipped configs"),
    "presets": ("unisd.cli.presets", "every recipe by name, and what it sets"),
    "export": ("unisd.cli.export", "the student of a run, or its moving-average teacher, as a model for others"),
    "eval": ("unisd.cli.evaluate", "evaluate a model or an adapter: benchmarks, procedural tasks, retention, drift"),
    "compare": ("unisd.cli.compare", "runs side by side: scores, drift, cost, curves, completions, as one page"),
    "sweep": ("unisd.cli.sweep", "presets x seeds x data by one command, which goes on after a kill"),
    "doctor": ("unisd.cli.doctor", "versions, devices, implementations with reasons, a numeric self-test"),
    "bench": ("unisd.cli.bench", "time, memory and error of this package and others; needs a clone of the repository"),
    "demo": ("unisd.cli.demo", "train SmolLM2-135M on procedural tasks on this machine and report before and after"),
}


# What `pip install unisd-kernels` alone leaves out.
_EXTRA_TRAIN = ("accelerate", "datasets", "jinja2", "matplotlib", "peft", "transformers", "trl", "yaml")


def usage() -> str:
    lines = ["usage: unisd COMMAND [options]", ""]
    for name, (_, description) in COMMANDS.items():
        lines.append(wrapped(description, width(), f"  {name:<8} "))
    end = "unisd COMMAND --help says more. --traceback (or UNISD_TRACEBACK=1) shows where an error comes from."
    return "\n".join([*lines, "", wrapped(end, width())])


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status is its return value: 2 for a mistake in what was given, with a line on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"unisd: there is no command {name!r}{nearest(name, COMMANDS)}\n\n{usage()}", file=sys.stderr)
        return 2
    traceback, rest = wants_traceback(rest)
    return run(f"unisd {name}", lambda: _module(name).main(rest), traceback=traceback)


def _module(name: str) -> Any:
    # Imported here, so that `unisd doctor` starts in a second and works where the trainer's packages are missing.
    try:
        return importlib.import_module(COMMANDS[name][0])
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing not in _EXTRA_TRAIN:
            raise
        raise CommandError(f"{missing} is not installed: pip install 'unisd-kernels[train]'") from error
