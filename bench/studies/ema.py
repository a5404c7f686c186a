"""`python -m bench ema`: the moving average over the tensors of a 135M model, in time and in error.

Time: against `torch._foreach_lerp_`, interleaved. Error: 1000 steps at decay 0.999 towards weights that move, against
float64, relative to the way the float64 average went (1 = did not move at all).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.measuring.timing import interleaved_seconds
from bench.parser import command_parser
from bench.records import results_file
from bench.records.environment import environment
from unisd_kernels import ema_update_

DECAY, STEPS = 0.999, 1000
# SmolLM2-135M: one embedding, and 30 layers of attention, MLP and norms, cut to 200 tensors.
LAYER: list[tuple[int, ...]] = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
SHAPES = [(49152, 576), *LAYER * 28]
SHAPES += [(576,)] * (200 - len(SHAPES))

# Weights whose error is followed.
FOLLOWED = (200, 2000)


def tensors(dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).mul_(0.05).to(dtype) for shape in SHAPES]


def time_updates(rounds: int) -> list[dict]:
    """Milliseconds of one update of all tensors, and as a multiple of `_foreach_lerp_` in the teacher's dtype."""
    wide, wide_student = tensors(torch.float32, 0), tensors(torch.float32, 1)
    narrow, narrow_student = tensors(torch.bfloat16, 0), tensors(torch.bfloat16, 1)
    compensation = [torch.zeros_like(tensor) for tensor in narrow]
    generator = torch.Generator().manual_seed(0)
    steps: dict[str, tuple[str, Callable[[], object]]] = {
        "float32 teacher, float32 student: _foreach_lerp_": (
            "",
            lambda: torch._foreach_lerp_(wide, wide_student, 1 - DECAY),
        ),
        "float32 teacher, float32 student: ema_update_": (
            "float32 teacher, float32 student: _foreach_lerp_",
            lambda: ema_update_(wide, wide_student, DECAY),
        ),
        "float32 teacher, bfloat16 student: cast and _foreach_lerp_": (
            "",
            lambda: torch._foreach_lerp_(wide, [tensor.float() for tensor in narrow_student], 1 - DECAY),
        ),
        "float32 teacher, bfloat16 student: ema_update_": (
            "float32 teacher, bfloat16 student: cast and _foreach_lerp_",
            lambda: ema_update_(wide, narrow_student, DECAY),
        ),
        "bfloat16 teacher: _foreach_lerp_ (stalls)": (
            "",
            lambda: torch._foreach_lerp_(narrow, narrow_student, 1 - DECAY),
        ),
        "bfloat16 teacher: ema_update_, compensation": (
            "bfloat16 teacher: _foreach_lerp_ (stalls)",
            lambda: ema_update_(narrow, narrow_student, DECAY, compensation=compensation),
        ),
        "bfloat16 teacher: ema_update_, stochastic": (
            "bfloat16 teacher: _foreach_lerp_ (stalls)",
            lambda: ema_update_(narrow, narrow_student, DECAY, rounding="stochastic", generator=generator),
        ),
    }
    samples = interleaved_seconds({name: step for name, (_, step) in steps.items()}, rounds, torch.device("cpu"))
    rows = []
    for name, (base, _) in steps.items():
        ratio = statistics.median(a / b for a, b in zip(samples[name], samples[base or name], strict=True))
        rows.append({"update": name, "ratio": ratio, "samples_seconds": samples[name]})
    return rows


def follow() -> list[dict]:
    """Error after `STEPS` updates towards a student that walks away from where both began."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(FOLLOWED, generator=generator).mul_(0.05).bfloat16()
    pace = torch.randn(FOLLOWED, generator=generator).mul_(2e-5)
    exact = start.double()
    teachers = {
        "naive bfloat16": [start.clone()],
        "compensation": [start.clone()],
        "stochastic": [start.clone()],
        "float32 shadow": [start.float()],
    }
    compensation = [torch.zeros_like(start)]
    student = start.float()
    for _ in range(STEPS):
        student += pace
        exact += (1 - DECAY) * (student.double() - exact)
        torch._foreach_lerp_(teachers["naive bfloat16"], [student.bfloat16()], 1 - DECAY)
        ema_update_(teachers["compensation"], [student], DECAY, compensation=compensation)
        ema_update_(teachers["stochastic"], [student], DECAY, rounding="stochastic", generator=generator)
        ema_update_(teachers["float32 shadow"], [student], DECAY)
    way = (exact - start.double()).norm()
    half_ulp = exact.abs() * 2.0**-9
    rows = []
    for name, (teacher,) in teachers.items():
        error = teacher.double() - exact
        progress = float(((teacher.double() - start.double()) * (exact - start.double())).sum() / way**2)
        rows.append(
            {
                "teacher": name,
                "error_over_way": float(error.norm() / way),
                "progress": progress,
                "error_in_half_ulps": float((error.abs() / half_ulp.clamp(min=1e-12)).median()),
            }
        )
    return rows


def tables(result: dict) -> str:
    """Markdown: ratios of the times, then the errors."""
    count = sum(torch.Size(shape).numel() for shape in SHAPES)
    lines = [f"One update of {len(SHAPES)} tensors, {count / 1e6:.0f}M weights:", ""]
    lines += ["| update | time / `_foreach_lerp_` |", "|---|---|"]
    lines += [f"| {row['update']} | {row['ratio']:.2f} |" for row in result["times"]]
    lines += ["", f"{STEPS} updates at decay {DECAY}, against float64:", ""]
    lines += [
        "| teacher | share of the way | error / way | median error in half ulps of bfloat16 |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['teacher']} | {row['progress']:.3f} | {row['error_over_way']:.1e} | {row['error_in_half_ulps']:.2g} |"
        for row in result["errors"]
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("ema", __doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="JSON file for everything, raw samples included")
    options = parser.parse_args(arguments)
    times, errors = time_updates(options.rounds), follow()
    result = {"environment": environment(torch.device("cpu")), "times": times, "errors": errors}
    print(f"{tables(result)}\n\n{json.dumps(result['environment'])}")
    if options.output:
        results_file.write_json(options.output, result)
    return 0
