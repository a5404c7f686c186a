"""`python -m bench --case unisd_star_cpu`: time as a multiple of the bare matrix products, extra peak memory, error.

Times are interleaved in one process; the memory of each contender comes from a process of its own. The table goes to
standard output, everything including raw samples to `--output`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.cases import CASES, Case, Inputs, make_inputs
from bench.environment import environment
from bench.memory import extra_peak_bytes
from bench.peers import PEERS, Step
from bench.timing import interleaved_seconds, median_ratio

FLOOR = "gemm floor"


def measure_memory(case: str, peer: str, beta: float, device: str) -> int:
    """Extra peak bytes of one step, from a fresh process."""
    command = [sys.executable, "-m", "bench", "--case", case, "--device", device, "--memory-of", peer]
    result = subprocess.run([*command, "--beta", str(beta)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"measuring the memory of {peer!r} failed:\n{result.stderr[-2000:]}")
    return int(result.stdout.split()[-1])


def gradient_error(step_gradient: torch.Tensor, inputs: Inputs, beta: float, rows: int) -> float:
    """Relative error of the first sequence's gradient rows against the float64 reference (which needs [n, V])."""
    from unisd_kernels.reference.loss import unisd_loss as reference_loss
    from unisd_kernels.spec import LossInputs, LossSpec

    case = inputs.case
    # Token-level agreement couples all rows through its quantile, so the weights are taken as given.
    head = inputs.head.detach()
    wide = type(head)(head.weight.double())
    hidden = inputs.student_hidden.detach()[:rows].double().requires_grad_()
    from unisd_kernels import agreement_weights, linear_logprobs

    auxiliary = torch.stack(
        [linear_logprobs(h, head, inputs.target_ids).logprobs.double() for h in inputs.auxiliary_hidden]
    )
    weights = agreement_weights(auxiliary, inputs.cu_seqlens, gamma=case.options["agreement_gamma"]).weights[:rows]
    options = {k: v for k, v in case.options.items() if k != "agreement_gamma"}
    result = reference_loss(
        LossInputs(
            student_hidden=hidden,
            student_head=wide,
            teacher_hidden=inputs.teacher_hidden[:rows].double(),
            teacher_head=wide,
            target_ids=inputs.target_ids[:rows],
            cu_seqlens=torch.tensor([0, rows], device=hidden.device),
            negative_hidden=inputs.negative_hidden[:rows].double(),
            token_weights=weights,
            num_items=case.num_sequences,
        ),
        LossSpec(beta=beta, return_entropy=False, **options),
    )
    (expected,) = torch.autograd.grad(result.loss, hidden)
    return float((step_gradient[:rows].double() - expected).norm() / expected.norm())


def run(case: Case, device: torch.device, rounds: int, peers: list[str]) -> list[dict[str, Any]]:
    from tqdm import tqdm

    inputs = make_inputs(case, device)
    first_sequence = int(inputs.cu_seqlens[1])
    rows = []
    for beta in case.beta:
        label = {0.0: "forward KL", 1.0: "reverse KL"}.get(beta, f"JSD beta={beta:g}")
        steps: dict[str, Step] = {}
        results: dict[str, dict[str, Any]] = {}
        for name in peers:
            results[name] = {"case": case.name, "divergence": label, "peer": name, "note": PEERS[name].note}
            try:
                step = PEERS[name].build(inputs, beta)
                gradient = step()[1]
            except torch.OutOfMemoryError:
                results[name]["failure"] = "out of memory"
                torch.cuda.empty_cache()
                continue
            except ImportError as error:
                results[name]["failure"] = f"not installed: {error}"
                continue
            steps[name] = step
            if gradient is not None:
                results[name]["gradient_error"] = gradient_error(gradient, inputs, beta, first_sequence)
            del gradient
        for name, step in steps.items():
            if name != FLOOR and device.type == "cuda":
                results[name]["extra_peak_bytes"] = extra_peak_bytes(step, device)
            elif name != FLOOR:
                results[name]["extra_peak_bytes"] = measure_memory(case.name, name, beta, str(device))
        samples = interleaved_seconds(steps, rounds, device, partial(tqdm, desc=f"{case.name}, {label}"))
        for name in steps:
            results[name]["ratio_to_floor"] = median_ratio(samples, name, FLOOR)
            results[name]["median_seconds"] = statistics.median(samples[name])
            results[name]["samples_seconds"] = samples[name]
        rows.extend(results.values())
    return rows


def table(case: Case, rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{case.name}: N={case.num_rows} H={case.hidden_size} V={case.vocab_size} K={case.num_auxiliary} "
        f"{str(case.dtype).removeprefix('torch.')} {'frozen' if case.frozen_head else 'trainable'} head; "
        f"floor = {case.num_products} bare matrix products",
        "",
        "| divergence | contender | time / floor | extra peak memory | gradient error |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if "failure" in row:
            lines.append(f"| {row['divergence']} | {row['peer']} | {row['failure']} | | |")
            continue
        memory = f"{row['extra_peak_bytes'] / 1e6:.0f} MB" if "extra_peak_bytes" in row else ""
        error = f"{row['gradient_error']:.1e}" if "gradient_error" in row else ""
        lines.append(f"| {row['divergence']} | {row['peer']} | {row['ratio_to_floor']:.2f} | {memory} | {error} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--case", choices=sorted(CASES), default="unisd_star_cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="+", choices=sorted(PEERS), default=list(PEERS))
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
        return
    peers = [FLOOR, *(name for name in arguments.peers if name != FLOOR)]
    rows = run(case, device, arguments.rounds, peers)
    print(table(case, rows))
    surroundings = environment(device, "python -m bench")
    print(f"\n{json.dumps(surroundings)}")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"environment": surroundings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
