"""`unisd launch`: a command on several processes, with the configs for accelerate that come with this package.

    unisd launch fsdp2 --num_processes 8 train --config run.yaml
    unisd launch fsdp2 --print    # the config, to keep and change

The first is `accelerate launch ... -m unisd train --config run.yaml`. There are ddp, fsdp2, zero2 and zero3. Without
--num_processes there is a process an accelerator. Options between the engine and the command are those of `accelerate
launch`. Where a process fails all are ended, and one of them tells why; `accelerate launch` and `torchrun` print their
own traceback and table after that.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Any

import torch

from unisd.cli.errors import CommandError
from unisd.cli.help import filled, width
from unisd.cli.parser import nearest
from unisd.launching import ENGINES, config_file


def main(arguments: list[str]) -> int:
    from unisd.cli import COMMANDS

    if not arguments or arguments[0] in ("-h", "--help"):
        print(filled(__doc__, width()))
        return 0 if arguments else 2
    engine, *rest = arguments
    if engine not in ENGINES:
        raise CommandError(f"there is no engine {engine!r}{nearest(engine, ENGINES)}; one of {', '.join(ENGINES)}")
    if rest == ["--print"]:
        print(config_file(engine).read_text(), end="")
        return 0
    start = next((i for i, argument in enumerate(rest) if argument in COMMANDS), None)
    if start is None:
        raise CommandError("name the command to start, for example: unisd launch fsdp2 train --config run.yaml")
    return _launch(engine, rest[:start], rest[start:])


def _launch(engine: str, options: list[str], command: list[str]) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parser = launch_command_parser()
    if not any(option.partition("=")[0] in ("--num_processes", "--num-processes") for option in options):
        if not torch.accelerator.is_available():
            raise CommandError("there is no accelerator to count: give --num_processes N")
        options = ["--num_processes", str(torch.accelerator.device_count()), *options]
    given = ["--config_file", str(config_file(engine)), *options, "-m", "unisd", *command]
    try:
        parsed = parser.parse_args(given)
    except SystemExit as error:  # argparse has told
        return int(error.code or 0)
    # Of a process that failed the launcher tells in a line of its own; its log would tell it thrice.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        launch_command(parsed)
    except ChildFailedError as error:
        return _told(error)
    return 0


def _told(error: Any) -> int:
    """Exit status of a run of which a process failed; one that was killed could not tell of it."""
    rank, failure = error.get_first_failure()
    if failure.exitcode >= 0:
        return int(failure.exitcode)
    name = signal.Signals(-failure.exitcode).name
    print(
        f"unisd launch: error: process {rank} was ended by {name}, and with it the run (SIGKILL is how a machine that "
        "is out of memory does it); go on with --resume",
        file=sys.stderr,
    )
    return 128 - int(failure.exitcode)
