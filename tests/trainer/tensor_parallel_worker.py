"""Two processes over gloo that share a tiny Llama's layers and train it, and one that has it whole.

    python -m tests.trainer.tensor_parallel_worker FOLDER

Accelerate takes its `ParallelismConfig` on accelerators only; here it is told that these two are some."""

from __future__ import annotations

import gc
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed
from torch.multiprocessing import start_processes
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from tests.trainer import tiny_run
from unisd.run.processes import ending_process_group
from unisd.trainer import UniSDTrainer

COMMON = {"max_steps": 2, "optim": "adamw_torch", "learning_rate": 0.005, "ema": "none"}
RUNS: dict[str, dict[str, Any]] = {
    "contrastive": {"preset": "contrastive", "per_device_train_batch_size": 6},
    "accumulated": {"preset": "unisd_star", "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
}
REFUSED: dict[str, dict[str, Any]] = {
    "average": {"ema": "full"},
    "copy": {"teacher": "base"},
    "adapter": {"peft_config": tiny_run.lora()},
    "window": {"preset": "unisd_star", "batch_statistics": "global"},
}


class Drawn(UniSDTrainer):
    """Draws its completions, and keeps them."""

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        drawn = super()._generate_single_turn(*args, **kwargs)
        self.drawn = [*getattr(self, "drawn", []), drawn]
        return drawn


def load(folder: Path, parallel: bool) -> Any:
    config = {"distributed_config": DistributedConfig(tp_size=2)} if parallel else {}
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, **config)


def trainer(folder: Path, parallel: bool, cls: type = tiny_run.FixedRollouts, **settings: Any) -> Any:
    items = tiny_run.rows(count=13)
    return tiny_run.trainer(folder / "run", load(folder, parallel), items=items, cls=cls, **{**COMMON, **settings})


def results(folder: Path, parallel: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, settings in RUNS.items():
        run = trainer(folder, parallel, **settings)
        run.train()
        weights = {
            key: (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach().clone()
            for key, weight in run.model.named_parameters()
        }
        found[name] = {
            "losses": tiny_run.losses(run),
            "norms": tiny_run.logged(run, "grad_norm"),
            "weights": weights,
            "slice": run.model.lm_head.weight.shape if not parallel else run.model.lm_head.weight.to_local().shape,
        }
    if parallel:
        run = trainer(folder, parallel, Drawn, max_steps=1)
        run.train()
        found["drawn"] = run.drawn
        for name, settings in REFUSED.items():
            try:
                trainer(folder, parallel, **settings)
                found[name] = ""
            except ValueError as error:
                found[name] = str(error)
    return found


def alone(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.save(results(folder, parallel=False), folder / "alone.pt")


def process(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    Accelerator.multi_device = property(lambda self: True)
    with ending_process_group():
        distributed.init_process_group("gloo")
        torch.save(results(folder, parallel=True), folder / f"rank{rank}.pt")


def main(folder: Path) -> None:
    tiny_run.llama().save_pretrained(folder / "model")
    gc.collect()
    gc.freeze()
    start_processes(alone, (folder,), nprocs=1, start_method="fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    start_processes(process, (folder,), nprocs=2, start_method="fork")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
