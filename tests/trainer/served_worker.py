"""Two ranks whose auxiliary views a server scores, under DDP or FSDP2 on gloo, forked from one that has imported.

    python -m tests.trainer.served_worker FOLDER ENGINE KIND ...

Of each kind in KINDS, FOLDER/KIND/rank0.pt holds the losses and gradients of the steps (`record`), and
FOLDER/KIND/rankN.txt what rank N wrote to its standard error, FOLDER/KIND/rankN.code how it ended.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import start_processes
from transformers import TrainerCallback

from tests.trainer import tiny_run
from tests.trainer.sharded_worker import ENGINES
from unisd.cli.errors import run as run_command
from unisd.run.processes import ending_process_group

RANKS, STEPS = 2, 2
BASE = {"teacher": "base", "ema": "none", "agreement_gamma": 2.0, "max_prompt_length": 64, "max_steps": STEPS}
KINDS: dict[str, dict[str, Any]] = {
    # By sequence, since which of them are in a micro-batch together is not the same on one process.
    "micro": {"preset": "unisd_star", "agreement": "sequence"},
    "global": {
        "preset": "agreement_token",
        "batch_statistics": "global",
        "normalization": "token",
        "weight_normalization": "weighted",
        "clip_quantile": 0.6,
    },
    "lora": {"preset": "agreement_sequence", "peft_config": tiny_run.lora()},
    # Its server answers one rank with an error.
    "refused": {"preset": "agreement_token"},
}


class WholeGradients(TrainerCallback):
    """Keeps the gradients of every optimizer step, of shards too."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        given = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
        whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in given.items()}
        self.steps.append({name: gradient.clone() for name, gradient in whole.items()})


def train(folder: Path, kind: str, url: str | None, micro_batches: int = 1) -> dict[str, Any]:
    """Two steps on two rows a micro-batch; what they were.

    Args:
        url: of the server; None to score here.
        micro_batches: of a step on this process.
    """
    served = {} if url is None else {"view_scorer": "server", "view_scorer_url": url}
    run = tiny_run.trainer(
        folder,
        items=tiny_run.rows(count=STEPS * tiny_run.NUM_ROWS),  # none twice
        **BASE,
        **KINDS[kind],
        **served,
        per_device_train_batch_size=tiny_run.NUM_ROWS // RANKS,
        gradient_accumulation_steps=micro_batches,
    )
    gradients = WholeGradients()
    run.add_callback(gradients)
    run.train()
    return {
        "type": str(run.accelerator.distributed_type),
        "losses": tiny_run.losses(run),
        "weight": tiny_run.logged(run, "unisd/agreement_weight"),
        "least": tiny_run.logged(run, "unisd/agreement_weight_min"),
        "gradients": gradients.steps,
    }


def key_of(kind: str, rank: int) -> str:
    """The key of a rank, by which the server tells them apart."""
    return f"{kind}-{rank}"


def process(rank: int, folder: Path, url: str) -> None:
    """What a launcher starts, with its variables, and how a command of the package ends."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / str(rank) / "error.json")
    os.environ["OPENAI_API_KEY"] = key_of(folder.name, rank)
    torch.set_num_threads(1)
    os.dup2(os.open(folder / f"rank{rank}.txt", os.O_CREAT | os.O_WRONLY), 2)

    def command() -> int:
        with ending_process_group():
            found = train(folder, folder.name, url)
        if rank == 0:
            torch.save(found, folder / "rank0.pt")
        return 0

    (folder / f"rank{rank}.code").write_text(str(run_command("unisd train", command, traceback=False)))


def main(base: Path, engine: str, url: str, kinds: list[str]) -> None:
    gc.collect()
    gc.freeze()
    os.environ |= {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= ENGINES[engine]
    for kind in kinds:
        (base / kind).mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
        start_processes(process, (base / kind, url), nprocs=RANKS, start_method="fork")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
