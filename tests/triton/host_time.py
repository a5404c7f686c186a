"""Microseconds of the host for few rows on the Triton path, up to its launches: `python -m tests.triton.host_time`.

A scoring, and UniSD* with its backward (K = 3, a negative view, features). On CPU tensors of the shapes that 256 rows
have, with Triton's launches recorded and not made (`stand_in.py`), the product of the gradient left out, and PyTorch's
other operations run on the CPU, where a small one takes about as long as its launch would. Not in it: what the driver
does, the filling of tensor descriptors among it. Outside the interpreter.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import triton

from tests.triton.stand_in import PROCESSORS, LaunchFreeDriver, active
from unisd_kernels import LMHead, linear_logprobs, unisd_loss, validation
from unisd_kernels.backends.registry import Implementation
from unisd_kernels.backends.triton import configs, fused_divergence, score
from unisd_kernels.backends.triton.backend import TritonBackend
from unisd_kernels.ops import logprobs, loss
from unisd_kernels.processor import processor_name

ROWS, COLUMNS, VIEWS = 256, 4096, 3
# Of a step's rows little is computed on this CPU, so that what is measured is the calls.
SCORED_WIDTH, STEP_WIDTH = 896, 64
REPEATS, SECONDS = 15, 0.05


class Forgetting(LaunchFreeDriver):
    """Keeps no launch: a growing list of them, with all their tensors, is what no GPU's driver has."""

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None


@contextmanager
def launch_free() -> Iterator[None]:
    """Inside, operations on CPU tensors take a GPU's path."""
    triton_backend = Implementation("triton", "a GPU's path", (), (), lambda: None, TritonBackend)
    with ExitStack() as stack:
        for target, name, value in (
            (configs, "architecture", lambda device: "sm_90"),
            (score, "num_sms", lambda device: PROCESSORS[90]),
            (fused_divergence, "num_sms", lambda device: PROCESSORS[90]),
            (logprobs, "resolve", lambda *_: triton_backend),
            (loss, "resolve", lambda *_: triton_backend),
            (validation, "_check_id_values", lambda *_: None),  # of a CPU's ids
            (TritonBackend, "hidden_gradient", lambda *_: None),
            (torch, "isfinite", lambda values: True),  # of a CPU's loss; nothing wrote the statistics
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(active(Forgetting(90, stream=0)))
        yield


def microseconds(call: Callable[[], object]) -> float:
    """The median of the repeats' means."""
    times, calls = [], 0
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        call()
        calls += 1
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times)


def measured() -> dict[str, float]:
    """Microseconds of each call."""

    def tensors(rows: int, width: int) -> torch.Tensor:
        return torch.zeros(rows, width, dtype=torch.bfloat16)

    ids, offsets = torch.zeros(ROWS, dtype=torch.int64), torch.tensor([0, ROWS // 2, ROWS])
    hidden, head = tensors(ROWS, SCORED_WIDTH), LMHead(tensors(COLUMNS, SCORED_WIDTH))
    teacher, step_head = tensors(ROWS, STEP_WIDTH), LMHead(tensors(COLUMNS, STEP_WIDTH))
    student, negative, *views = (tensors(ROWS, STEP_WIDTH) for _ in range(2 + VIEWS))
    student.requires_grad_()

    def score_rows() -> None:
        with torch.no_grad():
            linear_logprobs(hidden, head, ids)

    def step() -> None:
        options = {"negative_hidden": negative, "auxiliary_hidden": views, "feature_weight": 0.01, "clip_cap": 10.0}
        unisd_loss(student, step_head, teacher, step_head, ids, offsets, **options).loss.backward()
        student.grad = None

    calls: dict[str, Callable[[], None]] = {"scoring": score_rows, f"UniSD*, K = {VIEWS}, and its backward": step}
    with launch_free():
        return {name: microseconds(call) for name, call in calls.items()}


def main() -> None:
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set: the interpreter's path is another; unset it")
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    for name, taken in measured().items():
        print(f"{name}, {ROWS} rows: {taken:.0f} us ({processor_name()}, {versions})")


if __name__ == "__main__":
    main()
