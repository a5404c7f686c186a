"""The command `unisd`: `train`, `eval`, `doctor`, `bench`, `demo`. Each lives in the module of its name."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "train": ("unisd.cli.train", "train a model; settings from a YAML file and the command line"),
    "eval": ("unisd.cli.evaluate", "evaluate a model or an adapter: procedural tasks, retention"),
    "doctor": ("unisd.cli.doctor", "versions, devices, implementations with reasons, a numeric self-test"),
    "bench": ("unisd.cli.bench", "time, memory and error of this package and others; needs a clone of the repository"),
    "demo": ("unisd.cli.demo", "train SmolLM2-135M on procedural tasks on this machine and report before and after"),
}


def usage() -> str:
    lines = ["usage: unisd COMMAND [options]", ""]
    lines += [f"  {name:<8} {description}" for name, (_, description) in COMMANDS.items()]
    return "\n".join([*lines, "", "unisd COMMAND --help says more."])


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status is its return value."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"unisd: no command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    # Imported here, so that `unisd doctor` starts in a second and works where the trainer's packages are missing.
    return importlib.import_module(COMMANDS[name][0]).main(rest)
