"""The end of a run waits for a collective's thread, and never holds the interpreter that the thread needs."""

import subprocess
import sys
import textwrap

# A tensor whose last reference is the thread's, and whose end needs the interpreter for a while.
PROGRAM = """
import time
import torch
import torch.distributed.nn.functional  # its default arguments keep the group that is there when it is imported
from torch import distributed, nn
from unisd.run.processes import ending_process_group

class Slow:
    def __del__(self):
        time.sleep(0.5)
        print("dropped", flush=True)

class Trainer:
    def __init__(self):
        self.itself = self
        self.model = nn.parallel.DistributedDataParallel(nn.Linear(3, 3))

def train(fails):
    trainer = Trainer()
    trainer.model(torch.ones(1, 3)).sum().backward()
    tensor = torch.zeros(4_000_000)
    tensor.slow = Slow()
    distributed.all_reduce(tensor, async_op=True)
    del tensor
    if fails:
        raise FloatingPointError("a bad step")

def run(fails):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    with ending_process_group():
        train(fails)
    print("ended", flush=True)

run(False)
run(True)
"""


def test_the_group_ends_while_a_thread_needs_the_interpreter():
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout.split() == ["dropped", "ended", "dropped"], done.stderr[-2000:]
    assert done.returncode == 1
    assert "FloatingPointError: a bad step" in done.stderr
