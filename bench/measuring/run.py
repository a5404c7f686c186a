"""`python -m bench --case unisd_star --device auto --peers all`: cases with every peer, one after the other.

A row for each peer: time as a multiple of the bare matrix products, extra peak memory, error against float64
(docs/benchmarks.md says how each is taken). The tables go to standard output, everything including raw samples to
`--output`, as JSON or CSV.

Exit status 1: this package or the floor has no figure, or this package is wrong. With `--strict` also 1 where it misses
its bar, or is slower than in `--against`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.cases import CASES, OPERATIONS, find_case
from bench.inputs.sets import make_inputs
from bench.measuring.deadline import Deadline
from bench.measuring.measure import measure
from bench.parser import command_parser
from bench.peers import PEERS, names
from bench.records import results_file
from bench.records.environment import chosen_device, environment
from bench.records.failures import left_out
from bench.records.machine import multiplies_bfloat16
from bench.records.verdict import slow, wrong
from bench.report.tables import table
from unisd.cli.errors import CommandError

NO_UNITS = "this processor has no units for bfloat16, whose products are then slower than those of float32"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("run", __doc__)
    parser.add_argument(
        "--case",
        nargs="+",
        default=["unisd_star"],
        help=f"{', '.join(OPERATIONS)} (the device's own case of it), or one of {', '.join(CASES)}",
    )
    parser.add_argument("--device", default="auto", help="auto (an accelerator if there is one), cpu, cuda, ...")
    parser.add_argument("--peers", nargs="+", default=["all"], help=f"all, or some of: {', '.join(PEERS)}")
    parser.add_argument(
        "--beta", type=float, nargs="+", help="of the divergence: 0 forward KL, 1 reverse; default: the case's"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-rounds", type=int, help="of peers other than this package; default: --rounds")
    parser.add_argument("--threads", type=int, help="of torch on a CPU, also more than there are cores")
    parser.add_argument("--sample-seconds", type=float, help="the least a sample takes on a CPU, by repeating its step")
    parser.add_argument(
        "--memory",
        choices=("apart", "here"),
        default="apart",
        help="of a peer on a CPU: in its own process, or not",
    )
    parser.add_argument("--deadline", type=float, help="seconds after which nothing new is begun")
    parser.add_argument("--output", type=Path, help="file for everything, .json or .csv, raw samples included")
    parser.add_argument("--against", type=Path, help="an earlier result (.json); says what became slower")
    parser.add_argument("--strict", action="store_true", help="a missed bar or a slower kernel fails")
    parser.add_argument("--one-step-of", choices=sorted(PEERS), help="run it once, for a memory checker")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    device = chosen_device(options.device)
    if options.threads:
        # OMP_NUM_THREADS alone is cut to the number of cores.
        torch.set_num_threads(options.threads)
    try:
        cases = [find_case(name, device) for name in options.case]
        if options.beta:
            cases = [replace(case, beta=tuple(options.beta)) for case in cases]
        asked = [names(options.peers, case) for case in cases]
        if options.output:
            results_file.check_suffix(options.output)
    except ValueError as error:
        raise CommandError(str(error)) from None
    if options.one_step_of:
        case = cases[0]
        PEERS[options.one_step_of].build(case, case.beta[0], device)(make_inputs(case, device))
        return 0
    before = results_file.read(options.against)["rows"] if options.against else []
    deadline = Deadline(options.deadline) if options.deadline else Deadline(float("inf"))
    rows: list[dict[str, Any]] = []
    absent = []
    for case, peers in zip(cases, asked, strict=True):
        of_cpu = device.type == "cpu" and not case.on_accelerator
        if of_cpu and case.dtype == torch.bfloat16 and not multiplies_bfloat16():
            absent.append({"case": case.name, "peers": peers, "reason": NO_UNITS})
            print(f"{case.name}: left out: {NO_UNITS}\n")
            continue
        measured = measure(
            case,
            device,
            options.rounds,
            peers,
            peer_rounds=options.peer_rounds,
            with_energy=True,
            deadline=deadline,
            memory_apart=None if options.memory == "apart" else False,
            shortest_on_cpu=options.sample_seconds,
        )
        print(f"{table(measured)}\n")
        rows += measured
    surroundings = environment(device)
    if options.output:
        absent += left_out(rows)
        results_file.write(options.output, {"environment": surroundings, "rows": rows, "left_out": absent})
    errors, delays = wrong(rows), slow(rows, before)
    for line in (*errors, *delays):
        print(line)
    print(json.dumps(surroundings))
    return int(bool(errors) or (options.strict and bool(delays)))
