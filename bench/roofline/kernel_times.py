"""`python -m bench kernels --case kl scoring --output FILE`: where the time of a step goes, kernel by kernel, on a GPU.

Of each case and each of this package's designs: every kernel's milliseconds and launches a step, from the profiler of
torch, and what the device idled between them. Inputs rotate as in every timing here; a step before runs uncounted.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.cases import Case, find_case
from bench.inputs.sets import make_inputs
from bench.measuring.suite import DESIGNS
from bench.parser import cuda_device, gpu_command_parser
from bench.peers import PEERS
from bench.records import results_file
from bench.records.environment import environment
from bench.records.failures import failure_text

CASES = ("kl", "kl_trainable", "unisd_star", "scoring")
STEPS = 3
# Of a kernel's name, which for a library's product is a whole type.
NAME_LENGTH = 100


def measure(case: Case, beta: float, peer: str, device: torch.device, steps: int = STEPS) -> dict[str, Any]:
    """Milliseconds a step from first launch to last end, and of each kernel, the longest first."""
    sets = itertools.cycle([make_inputs(case, device, seed) for seed in range(2)])
    step = PEERS[peer].build(case, beta, device)
    step(next(sets))
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as trace:
        for _ in range(steps):
            step(next(sets))
        torch.cuda.synchronize(device)
    kernels: dict[str, dict[str, Any]] = {}
    begin, end = float("inf"), 0.0
    for event in trace.events():
        if event.device_type != DeviceType.CUDA:
            continue
        begin, end = min(begin, event.time_range.start), max(end, event.time_range.end)
        row = kernels.setdefault(event.name[:NAME_LENGTH], {"launches": 0.0, "milliseconds": 0.0})
        row["launches"] += 1 / steps
        row["milliseconds"] += event.time_range.elapsed_us() / 1e3 / steps
    ordered = sorted(kernels.items(), key=lambda item: -item[1]["milliseconds"])
    busy = sum(row["milliseconds"] for _, row in ordered)
    whole = (end - begin) / 1e3 / steps
    return {
        "case": case.name,
        "divergence": case.divergence(beta),
        "peer": peer,
        "milliseconds": whole,
        "idle_milliseconds": whole - busy,
        "floor_flops": case.flops,
        "kernels": [{"name": name, **row} for name, row in ordered],
    }


def table(result: dict[str, Any]) -> str:
    """Kernels that take a hundredth of their step at least."""
    lines = [f"Kernels of a step on {result['environment']['device']}.", ""]
    lines += ["| case | design | kernel | launches | ms | share |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        divergence = row.get("divergence", "forward KL")  # the first results say nothing of it
        head = (
            f"| {row['case']}{', ' + divergence if divergence not in ('forward KL', 'none') else ''} | {row['peer']} |"
        )
        if "failure" in row:
            lines.append(f"{head} {row['failure']} | | | |")
            continue
        lines.append(f"{head} **all** | | {row['milliseconds']:.3f} | idle {row['idle_milliseconds']:.3f} ms |")
        for kernel in row["kernels"]:
            share = kernel["milliseconds"] / row["milliseconds"]
            if share >= 0.01:
                name = kernel["name"].replace("|", "/")
                lines.append(
                    f"{head} `{name}` | {kernel['launches']:.0f} | {kernel['milliseconds']:.3f} | {share:.3f} |"
                )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = gpu_command_parser("kernels", __doc__)
    parser.add_argument("--case", nargs="+", default=list(CASES))
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(DESIGNS))
    options = parser.parse_args(arguments)
    if options.report:
        print(table(results_file.read(options.report)))
        return 0
    device = cuda_device(parser, options.device, "kernels")
    result: dict[str, Any] = {"environment": environment(device), "rows": []}
    for name in options.case:
        case = find_case(name, device)
        # Every divergence of the frozen head; of the others one shows what there is to see.
        every = case.operation == "divergence" and case.frozen_head
        for beta, peer in itertools.product(case.beta if every else case.beta[:1], options.peers):
            try:
                row = measure(case, beta, peer, device)
            except Exception as error:
                what = {"case": case.name, "divergence": case.divergence(beta), "peer": peer}
                row = {**what, "failure": failure_text(error)}
            result["rows"].append(row)
            torch.cuda.empty_cache()
            if options.output:
                results_file.write_json(options.output, result)
    print(table(result))
    return int(any("failure" in row for row in result["rows"]))
