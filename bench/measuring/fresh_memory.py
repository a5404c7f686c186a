"""Extra peak memory of one peer's step on a CPU, in a process of its own, where no other's leftovers are."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

import torch

from bench.cases import Case
from bench.inputs.sets import make_inputs
from bench.measuring.memory import extra_peak_bytes
from bench.peers import PEERS

CPU = torch.device("cpu")
# A step of so many rows and columns loads the code and what libraries keep for good.
FEW_ROWS, FEW_COLUMNS = 64, 1024


def peak_in_fresh_process(case: Case, beta: float, peer: str) -> int:
    """Bytes that one step adds at its peak, in a process that has only imported its modules, which a server does once
    for all of them. With as many threads as this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(_peak, case, beta, peer, torch.get_num_threads()).result()


def _peak(case: Case, beta: float, name: str, threads: int) -> int:
    torch.set_num_threads(threads)
    peer = PEERS[name]
    inputs = make_inputs(case, CPU)
    step = partial(peer.build(case, beta, CPU), inputs)
    if peer.compiles:
        step()
    else:
        few = replace(case, num_rows=FEW_ROWS, vocab_size=FEW_COLUMNS, num_sequences=1, data="random")
        peer.build(few, beta, CPU)(make_inputs(few, CPU))
    return extra_peak_bytes(step, CPU)
