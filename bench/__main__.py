"""`python -m bench --case unisd_star_cpu`: time as a multiple of the bare matrix products, extra peak memory, error.

Times are interleaved in one process; on a CPU the memory of each contender comes from a process of its own. The table
goes to standard output, everything including raw samples to `--output`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from bench.cases import CASES, make_inputs
from bench.environment import environment
from bench.measure import measure
from bench.memory import extra_peak_bytes
from bench.peers import DEFAULT_PEERS, FLOOR, OURS, PEERS
from bench.tables import table


def main() -> int:
    """1 if the floor or this package is a row without a time."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--case", choices=sorted(CASES), default="unisd_star_cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="+", choices=sorted(PEERS), default=list(DEFAULT_PEERS))
    parser.add_argument("--output", type=Path, help="JSON file for everything, raw samples included")
    parser.add_argument("--memory-of", choices=sorted(PEERS), help=argparse.SUPPRESS)
    parser.add_argument("--beta", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    case, device = CASES[arguments.case], torch.device(arguments.device)
    if arguments.memory_of:
        inputs = make_inputs(case, device)
        # The matrix library's own scratch space is not the contender's: warm it up first.
        torch.mm(inputs.student_hidden.detach()[:64], inputs.head.weight.detach().T)
        step = PEERS[arguments.memory_of].build(inputs, arguments.beta)
        print(extra_peak_bytes(step, device))
        return 0
    peers = [FLOOR, *(name for name in arguments.peers if name != FLOOR)]
    rows = measure(case, device, arguments.rounds, peers)
    print(table(case, rows))
    surroundings = environment(device, "python -m bench")
    print(f"\n{json.dumps(surroundings)}")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"environment": surroundings, "rows": rows}, indent=1) + "\n")
    return int(any("failure" in row for row in rows if row["peer"] in (FLOOR, OURS)))


if __name__ == "__main__":
    sys.exit(main())
