"""`python -m bench numerics`: the digits of a small divergence.

Student and teacher share a bfloat16 head; the teacher's hidden states are the student's with noise, so that the mean D
runs from 1e-1 down to 1e-6. Printed is the largest and the median relative error of D over the rows, against
float64 from the same operands.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.parser import command_parser
from bench.records import results_file
from bench.records.environment import environment
from unisd_kernels import LMHead, linear_divergence, reference

ROWS, WIDTH, COLUMNS = 16, 576, 49152
TARGETS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
BETAS = {"forward KL": 0.0, "reverse KL": 1.0, "JSD": 0.5}


def noisy(hidden: torch.Tensor, scale: float) -> torch.Tensor:
    """bfloat16 neighbours of hidden + noise, by stochastic rounding: below half an ulp some elements move, by one."""
    generator = torch.Generator().manual_seed(2)
    target = hidden.float() + scale * torch.randn(hidden.shape, generator=generator)
    down = torch.nextafter(target.bfloat16(), torch.tensor(-torch.inf, dtype=torch.bfloat16))
    low = torch.where(target.bfloat16().float() > target, down, target.bfloat16())
    high = torch.nextafter(low, torch.tensor(torch.inf, dtype=torch.bfloat16))
    share = (target - low.float()) / (high.float() - low.float())
    return torch.where(torch.rand(hidden.shape, generator=generator) < share, high, low)


def exact_divergence(student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor, beta: float) -> torch.Tensor:
    head = LMHead(weight.double())
    return reference.linear_divergence(student.double(), head, teacher.double(), head, beta)


def plain_divergence(student_logits: torch.Tensor, teacher_logits: torch.Tensor, beta: float) -> torch.Tensor:
    """The textbook formula, float32 from given logits."""
    s, t = (torch.log_softmax(logits.float(), -1) for logits in (student_logits, teacher_logits))
    if beta == 0.0:
        return (t.exp() * (t - s)).sum(-1)
    if beta == 1.0:
        return (s.exp() * (s - t)).sum(-1)
    m = torch.log((1 - beta) * s.exp() + beta * t.exp())
    return beta * (t.exp() * (t - m)).sum(-1) + (1 - beta) * (s.exp() * (s - m)).sum(-1)


def scale_for(target: float, hidden: torch.Tensor, weight: torch.Tensor) -> float:
    """The noise whose mean forward KL is about `target`; D goes with its square."""
    low, high = 1e-7, 1.0
    for _ in range(12):
        middle = (low * high) ** 0.5
        if float(exact_divergence(hidden, noisy(hidden, middle), weight, 0.0).mean()) < target:
            low = middle
        else:
            high = middle
    return high


def measure() -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(COLUMNS, WIDTH, generator=generator).mul_(3.0 / WIDTH**0.5).bfloat16()
    hidden = torch.randn(ROWS, WIDTH, generator=generator).bfloat16()
    head = LMHead(weight)
    rows = []
    for target in TARGETS:
        teacher = noisy(hidden, scale_for(target, hidden, weight))
        logits = {
            "float32 logits": (hidden.float() @ weight.float().T, teacher.float() @ weight.float().T),
            "bfloat16 logits": (hidden @ weight.T, teacher @ weight.T),
        }
        for label, beta in BETAS.items():
            exact = exact_divergence(hidden, teacher, weight, beta)
            peers = {
                "unisd_kernels native (difference form)": linear_divergence(
                    hidden, head, teacher, head, beta=beta, impl="native"
                ),
                "unisd_kernels torch": linear_divergence(hidden, head, teacher, head, beta=beta, impl="torch"),
                **{name: plain_divergence(*pair, beta) for name, pair in logits.items()},
            }
            for name, values in peers.items():
                error = (values.double() - exact).abs() / exact
                rows.append(
                    {
                        "divergence": label,
                        "mean": float(exact.mean()),
                        "peer": name,
                        "largest": float(error.max()),
                        "median": float(error.median()),
                    }
                )
    return rows


def table(result: dict) -> str:
    """Markdown: largest and median error for each divergence and size."""
    rows = result["rows"]
    names = list(dict.fromkeys(row["peer"] for row in rows))
    lines = [
        f"Relative error of D, largest (median) over {ROWS} rows; H={WIDTH} V={COLUMNS}, bfloat16 operands:",
        "",
        f"| divergence | mean D | {' | '.join(names)} |",
        "|---" * (len(names) + 2) + "|",
    ]
    for start in range(0, len(rows), len(names)):
        group = rows[start : start + len(names)]
        cells = " | ".join(f"{row['largest']:.0e} ({row['median']:.0e})" for row in group)
        lines.append(f"| {group[0]['divergence']} | {group[0]['mean']:.1e} | {cells} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("numerics", __doc__)
    parser.add_argument("--output", type=Path, help="JSON file for everything")
    options = parser.parse_args(arguments)
    rows = measure()
    result = {"environment": environment(torch.device("cpu")), "rows": rows}
    print(f"{table(result)}\n\n{json.dumps(result['environment'])}")
    if options.output:
        results_file.write_json(options.output, result)
    return 0
