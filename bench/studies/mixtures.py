"""`python -m bench mixtures`: what a teacher made of K + 1 views costs, and the digits that it keeps.

Time: `mix_hidden` of the teacher's and K auxiliary views and `unisd_loss` to it, forward and backward with a frozen
head, for K = 1 to 8; against K = 1 and the floor, three bare products, of the same round. Beside them, for the first
and last K: the mixture by the dense formulas, and the same views scored by the loss for agreement, K products more. On
a CPU the processor's time of each sample is kept too: it hardly depends on who else wants the cores.

Digits: SmolLM2's hidden states under real contexts in bfloat16, in which a mixture is rounded once. The error of D to
each mixture against float64 from the same operands, beside PyTorch's in the operands' dtype (logits in bfloat16,
statistics in float32).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case
from bench.inputs.sets import make_inputs, more_inputs, rotating
from bench.inputs.smollm2 import real_views
from bench.measuring.timing import interleaved_seconds, ratios, spread
from bench.parser import command_parser
from bench.peers import dense, gemm_floor
from bench.records import results_file
from bench.records.environment import chosen_device, environment
from unisd.cli.parser import positive
from unisd_kernels import LMHead, linear_divergence, mix_hidden, reference, unisd_loss
from unisd_kernels.config import LossInputs

MOST = 8
TEMPERATURE, ALPHA = 0.7, 0.5
FLOOR = "floor: three products"
ROWS, WIDTH, COLUMNS = 256, 576, 49152
PEER_ROUNDS = 3
DIGIT_ROWS, DIGIT_VIEWS = 64, 3


def ours(num_views: int) -> str:
    return f"mixture, K = {num_views}"


def mixture_step(num_views: int) -> Callable[[LossInputs], object]:
    """Loss and gradient with the geometric mean of the teacher's and K auxiliary views as the teacher."""
    weights = [1.0 / (1 + num_views)] * (1 + num_views)

    def step(inputs: LossInputs) -> object:
        views = [inputs.teacher_hidden, *inputs.auxiliary_hidden[:num_views]]
        return _gradient(inputs, mix_hidden(views, weights, inputs.teacher_head), ())

    return step


def scored_step(num_views: int) -> Callable[[LossInputs], object]:
    """Loss and gradient with K views that are scored for agreement."""
    return lambda inputs: _gradient(inputs, inputs.teacher_hidden, inputs.auxiliary_hidden[:num_views])


def _gradient(inputs: LossInputs, teacher: torch.Tensor, auxiliary: Sequence[torch.Tensor]) -> torch.Tensor:
    result = unisd_loss(
        inputs.student_hidden,
        inputs.student_head,
        teacher,
        inputs.teacher_head,
        inputs.target_ids,
        inputs.cu_seqlens,
        auxiliary_hidden=auxiliary,
        temperature=TEMPERATURE,
        return_statistics=False,
    )
    return torch.autograd.grad(result.loss, inputs.student_hidden)[0]


def dense_step(num_views: int) -> Callable[[LossInputs], object]:
    """The dense formulas as a careful user writes them: the views' logits are summed, and one softmax taken."""

    def step(inputs: LossInputs) -> object:
        weight = inputs.student_head.weight
        with torch.no_grad():
            views = [inputs.teacher_hidden, *inputs.auxiliary_hidden[:num_views]]
            scores = dense.logits(views[0], weight, TEMPERATURE, torch.float32)
            for view in views[1:]:
                scores += dense.logits(view, weight, TEMPERATURE, torch.float32)
            teacher = torch.log_softmax(scores.div_(1 + num_views), dim=-1)
        student = dense.log_probs(inputs.student_hidden, weight, TEMPERATURE, torch.float32)
        loss = reference.divergence_from_log_probs(student, teacher, 0.0).mean()
        return torch.autograd.grad(loss, inputs.student_hidden)[0]

    return step


def measure_times(case: Case, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """A row for each peer, with its raw samples and its ratios to K = 1 and to the floor within a round."""
    inputs = make_inputs(case, device)
    sets = more_inputs(case, inputs, device)
    steps: dict[str, tuple[int | None, Callable[[LossInputs], object]]] = {
        FLOOR: (None, gemm_floor.build(case_of_floor(case), 0.0, device)),
        **{ours(k): (k, mixture_step(k)) for k in range(1, MOST + 1)},
        **{f"dense mixture, K = {k}": (k, dense_step(k)) for k in (1, MOST)},
        **{f"views scored for agreement, K = {k}": (k, scored_step(k)) for k in (1, MOST)},
    }
    processor: dict[str, list[float]] = {name: [] for name in steps}

    @contextmanager
    def watched(name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        processor[name].append(time.process_time() - start)

    samples = interleaved_seconds(
        {name: rotating(step, sets, place) for place, (name, (_, step)) in enumerate(steps.items())},
        rounds,
        device,
        fewer_rounds={name: min(rounds, PEER_ROUNDS) for name in steps if name != FLOOR and not name.startswith("mix")},
        watching=watched,
    )
    # The first round is not counted.
    processor = {name: taken[1:] for name, taken in processor.items()}
    rows = []
    for name, (num_views, _) in steps.items():
        row: dict[str, Any] = {"peer": name, "views": num_views, "samples_seconds": samples[name]}
        for to, base in (("first", ours(1)), ("floor", FLOOR)):
            row[f"ratio_to_{to}"] = spread(ratios(samples, name, base))._asdict()
            if device.type == "cpu":
                row[f"processor_ratio_to_{to}"] = spread(ratios(processor, name, base))._asdict()
        if device.type == "cpu":
            row["samples_processor_seconds"] = processor[name]
        rows.append(row)
    return rows


def case_of_floor(case: Case) -> Case:
    """Student, teacher and the gradient: what a divergence takes."""
    return Case("floor", case.num_rows, case.hidden_size, case.vocab_size, "divergence", 0, dtype=case.dtype)


@torch.no_grad()
def measure_digits(views: LossInputs) -> list[dict[str, Any]]:
    """Errors of D [N] of each mixture, in nats and relative to its mean."""
    dtype = torch.bfloat16
    narrow = LMHead(views.student_head.weight.to(dtype))
    student, teacher = views.student_hidden.to(dtype), views.teacher_hidden.to(dtype)
    assert views.negative_hidden is not None
    away = {"contrastive": views.negative_hidden.to(dtype), "pmi": student}
    mixtures = {
        "self": ([teacher], [1.0]),
        "consensus": (
            [teacher, *(view.to(dtype) for view in views.auxiliary_hidden)],
            [1.0 / (1 + len(views.auxiliary_hidden))] * (1 + len(views.auxiliary_hidden)),
        ),
        **{name: ([teacher, other], [1.0 + ALPHA, -ALPHA]) for name, other in away.items()},
    }
    wide = LMHead(narrow.weight.double())
    rows = []
    for name, (hidden, weights) in mixtures.items():
        exact = _divergence(student.double(), [view.double() for view in hidden], weights, wide)
        mixed = mix_hidden(hidden, weights, narrow)
        found = {
            "ours": linear_divergence(student, narrow, mixed, narrow, temperature=TEMPERATURE),
            "bfloat16 logits": _divergence(student, hidden, weights, narrow),
        }
        errors = {peer: (values.double() - exact).abs() for peer, values in found.items()}
        rows.append(
            {
                "mixture": name,
                "mean": float(exact.mean()),
                **{peer: {"mean": float(each.mean()), "largest": float(each.max())} for peer, each in errors.items()},
            }
        )
    return rows


def _divergence(
    student: torch.Tensor, views: Sequence[torch.Tensor], weights: Sequence[float], head: LMHead
) -> torch.Tensor:
    """Forward KL to the mixture from logits in the operands' dtype, [N]."""

    def log_probs(hidden: torch.Tensor) -> torch.Tensor:
        logits = hidden @ head.weight.T
        return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / TEMPERATURE, dim=-1)

    teacher = sum(weight * log_probs(view) for view, weight in zip(views, weights, strict=True))
    assert isinstance(teacher, torch.Tensor)
    return reference.divergence_from_log_probs(log_probs(student), teacher.log_softmax(-1), 0.0)


def table(result: Mapping[str, Any]) -> str:
    """Markdown: times, then digits."""
    size = result["size"]
    on_cpu = "processor_ratio_to_first" in result["times"][0]
    titles = ["", "time / K = 1", "time / floor", *(["processor's time / K = 1"] if on_cpu else [])]
    lines = [
        f"Loss and gradient to a geometric mean of K + 1 views; N={size['rows']} H={size['width']} "
        f"V={size['columns']}, {size['dtype']}, frozen head; median (0.2 and 0.8 quantile) of the ratios in a round:",
        "",
        f"| {' | '.join(titles)} |",
        "|---" * len(titles) + "|",
    ]
    for row in result["times"]:
        columns = ["ratio_to_first", "ratio_to_floor", *(["processor_ratio_to_first"] if on_cpu else [])]
        lines.append(f"| {row['peer']} | {' | '.join(_shown(row[name]) for name in columns)} |")
    mine = [row for row in result["times"] if row["peer"].startswith("mixture")]
    measure = "processor_ratio_to_first" if on_cpu else "ratio_to_first"
    medians = [row[measure]["median"] for row in mine]
    of = "of the processor's time " if on_cpu else ""
    lines += [
        "",
        f"From K = 1 to {MOST} the median {of}stays within "
        f"{100 * (max(medians) - 1):+.1f}% and {100 * (min(medians) - 1):+.1f}% of K = 1.",
    ]
    if result["digits"]:
        lines += [
            "",
            f"Error of D (forward KL at temperature {TEMPERATURE:g}, alpha {ALPHA:g}, K = {DIGIT_VIEWS}) in nats, mean "
            f"(largest) of {DIGIT_ROWS} tokens, SmolLM2-135M's states in bfloat16, against float64:",
            "",
            "| mixture | mean D | `mix_hidden` and `linear_divergence` | logits of each view in bfloat16 |",
            "|---" * 4 + "|",
        ]
        lines += [
            f"| {row['mixture']} | {row['mean']:.3f} | {_error(row['ours'])} | {_error(row['bfloat16 logits'])} |"
            for row in result["digits"]
        ]
    return "\n".join(lines)


def _shown(found: Mapping[str, float]) -> str:
    return f"{found['median']:.3f} ({found['p20']:.3f} to {found['p80']:.3f})"


def _error(found: Mapping[str, float]) -> str:
    return f"{found['mean']:.1e} ({found['largest']:.1e})"


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("mixtures", __doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--rounds", type=positive, default=15, help=f"of the dense and the scored {PEER_ROUNDS}")
    for name, size in (("rows", ROWS), ("width", WIDTH), ("columns", COLUMNS)):
        parser.add_argument(f"--{name}", type=positive, default=size)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--no-digits", action="store_true", help="time alone: needs no model")
    parser.add_argument("--output", type=Path, help="JSON file for everything, raw samples included")
    options = parser.parse_args(arguments)
    device = chosen_device(options.device)
    dtype = getattr(torch, options.dtype)
    case = Case("mixtures", options.rows, options.width, options.columns, num_auxiliary=MOST, dtype=dtype)
    result = {
        "environment": environment(device),
        "size": {name: getattr(options, name) for name in ("rows", "width", "columns", "dtype")},
        "times": measure_times(case, device, options.rounds),
        "digits": [] if options.no_digits else measure_digits(real_views(DIGIT_ROWS, DIGIT_VIEWS, torch.device("cpu"))),
    }
    print(f"{table(result)}\n\n{json.dumps(result['environment'])}")
    if options.output:
        results_file.write_json(options.output, result)
    return 0
