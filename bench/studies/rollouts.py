"""`python -m bench rollouts`: what sampling through a LoRA adapter costs against sampling from merged weights.

With the demo's adapter (rank 16 on every linear layer); the time of merging (`merged_rollouts`) is in it. Completions
have their full length. Figures are medians over rounds of the ratio within a round.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.parser import command_parser
from bench.records import results_file
from bench.records.environment import chosen_device, environment
from bench.studies.step_runs import MODELS, make_workbench
from unisd.generation.merged import merged_adapters
from unisd.models import SMOLLM2

CASES = {"base": (False, False), "adapter": (True, False), "merged": (True, True)}
"""Name -> whether there is an adapter, and whether it is merged."""


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("rollouts", __doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--model", choices=MODELS, default=SMOLLM2)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--prompt_tokens", type=int, default=80)
    parser.add_argument("--new_tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(list(arguments))
    device = chosen_device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        bench = make_workbench(options.model, device, options.batch_size, options.new_tokens, folder)
    result = measure(bench.model, options)
    result |= {"environment": environment(device), "options": {k: str(v) for k, v in vars(options).items()}}
    print("\n".join(table(result)))
    if options.output:
        results_file.write_json(options.output, result)
    return 0


def measure(adapted: Any, options: Any) -> dict[str, Any]:
    """Seconds of each rollout by case, and the median ratio to the base's."""
    generator = torch.Generator().manual_seed(0)
    shape = options.batch_size, options.prompt_tokens
    ids = torch.randint(10, adapted.config.vocab_size, shape, generator=generator).to(adapted.device)
    sampling = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens, "do_sample": True}
    sampling |= {"attention_mask": torch.ones_like(ids), "top_k": 0}
    adapted.eval()
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for number in range(options.rounds + 1):
        for name, (has_adapter, merges) in CASES.items():
            _wait(adapted)
            started = time.perf_counter()
            with torch.no_grad(), merged_adapters(adapted, merges):
                if has_adapter:
                    adapted.generate(input_ids=ids, **sampling)
                else:
                    with adapted.disable_adapter():
                        adapted.generate(input_ids=ids, **sampling)
            _wait(adapted)
            if number:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    ratios = {
        name: statistics.median(a / b for a, b in zip(times, seconds["base"], strict=True))
        for name, times in seconds.items()
    }
    saved = statistics.median(a / m for a, m in zip(seconds["adapter"], seconds["merged"], strict=True))
    return {"ratio_to_base": ratios, "adapter_over_merged": saved, "samples_seconds": seconds}


def table(result: dict[str, Any]) -> list[str]:
    """For a terminal."""
    lines = [f"{'rollout':<10} {'time / base':>11}"]
    lines += [f"{name:<10} {ratio:>11.2f}" for name, ratio in result["ratio_to_base"].items()]
    return [*lines, f"adapter / merged: {result['adapter_over_merged']:.2f}"]


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
