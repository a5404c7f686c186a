"""Microseconds of the host for a scoring on the Triton path, up to its launches: `python -m tests.triton.host_time`.

On CPU tensors of the shapes that 256 rows have, with Triton's launches recorded and not made (`stand_in.py`), and
PyTorch's other operations run on the CPU, where a small one takes about as long as its launch would. Not in it: what
the driver does, the filling of tensor descriptors among it. Outside the interpreter.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import triton

from tests.triton.stand_in import PROCESSORS, LaunchFreeDriver, active
from unisd_kernels import LMHead, linear_logprobs
from unisd_kernels.backends.registry import Implementation
from unisd_kernels.backends.triton import configs, score
from unisd_kernels.backends.triton.backend import TritonBackend
from unisd_kernels.ops import logprobs
from unisd_kernels.processor import processor_name
from unisd_kernels.validation import assert_ids_async

ROWS, WIDTH, COLUMNS = 256, 896, 4096
REPEATS, CALLS = 15, 100


@contextmanager
def launch_free() -> Iterator[None]:
    """Inside, operations on CPU tensors take a GPU's path."""
    triton_backend = Implementation("triton", "a GPU's path", (), (), lambda: None, TritonBackend)
    with ExitStack() as stack:
        for target, name, value in (
            (configs, "architecture", lambda device: "sm_90"),
            (score, "num_sms", lambda device: PROCESSORS[90]),
            (logprobs, "resolve", lambda *_: triton_backend),
            (logprobs, "check_target_ids", lambda ids, rows, columns, device: assert_ids_async(ids, columns)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(active(LaunchFreeDriver(90, stream=0)))
        yield


def microseconds(call: Callable[[], object]) -> float:
    """The median of the repeats' means."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times)


def main() -> None:
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set: the interpreter's path is another; unset it")
    torch.set_num_threads(1)
    hidden, weight = (torch.zeros(rows, WIDTH, dtype=torch.bfloat16) for rows in (ROWS, COLUMNS))
    head, ids = LMHead(weight), torch.zeros(ROWS, dtype=torch.int64)
    with launch_free(), torch.no_grad():
        linear_logprobs(hidden, head, ids)
        taken = microseconds(lambda: linear_logprobs(hidden, head, ids))
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"scoring, {ROWS} rows: {taken:.0f} us ({processor_name()}, {versions})")


if __name__ == "__main__":
    main()
