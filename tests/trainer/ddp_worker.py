"""Two processes of a data-parallel run: each trains two steps a setting and saves the weights, then meets a NaN.

    python -m tests.trainer.ddp_worker FOLDER

forks the two, once everything is imported: that takes longer than the runs."""

import gc
import os
import socket
import sys

import torch
from torch.multiprocessing import start_processes

from tests.trainer import tiny_run
from unisd.run.processes import ending_process_group

RESULT = "result.pt"
SETTINGS = {
    "sequence": {"preset": "contrastive", "ema": "full", "sync_steps": 1},
    "token": {"preset": "plain", "normalization": "token"},
    # Micro-batches of one row: four on one process, two on each of two.
    "global": {
        "preset": "unisd_star",
        "batch_statistics": "global",
        "agreement_gamma": 2.0,
        "clip_quantile": 0.6,
        "normalization": "token",
    },
    # A token in each of two completions, which both are on one process in one step.
    "masked": {
        "preset": "agreement_token",
        "batch_statistics": "global",
        "agreement_gamma": 2.0,
        "skip_first_tokens": 4,
    },
}


def main(folder: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    out = {}
    for name, settings in SETTINGS.items():
        share = tiny_run.NUM_ROWS // processes
        micro_batch = 1 if "batch_statistics" in settings else share
        run = tiny_run.trainer(
            folder,
            cls=Counted,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=share // micro_batch,
            max_steps=2,
            drift_probe=tiny_run.PROBE,
            drift_probe_every=1,
            **settings,
        )
        run.train()
        out[name] = {
            "weights": {name: parameter.detach() for name, parameter in run.model.named_parameters()},
            "divergence": tiny_run.logged(run, "unisd/divergence"),
            "drift": tiny_run.logged(run, "unisd/drift_kl"),
            "num_tokens": run.accelerator.gather(torch.tensor([run.num_tokens])),
        }
    if run.accelerator.is_main_process:
        torch.save(out, f"{folder}/{RESULT}")


class Counted(tiny_run.FixedRollouts):
    """Keeps the number of counted tokens of each micro-batch."""

    def _unisd_loss(self, *args):
        result = super()._unisd_loss(*args)
        self.num_tokens = [*getattr(self, "num_tokens", []), int(result[2])]
        return result


class BadOnTheLast(tiny_run.FixedRollouts):
    """In the second step the teacher's first hidden state is NaN, on the last process alone."""

    def _get_last_hidden_state(self, *args):
        hidden = super()._get_last_hidden_state(*args)
        last = self.accelerator.process_index == self.accelerator.num_processes - 1
        bad = not torch.is_grad_enabled() and self.state.global_step == 1 and last
        return hidden.index_fill(0, torch.tensor([0]), torch.nan) if bad else hidden


def not_finite(folder: str) -> None:
    """Skip the step, then stop at it; either way both processes do the same."""
    settings = {"per_device_train_batch_size": 2, "max_steps": 3, "preset": "plain", "view_passes": "padded"}
    run = tiny_run.trainer(folder, cls=BadOnTheLast, on_nonfinite="skip", **settings)
    run.train()
    out = {"losses": tiny_run.losses(run), "weights": [p.detach() for p in run.model.parameters()]}
    run = tiny_run.trainer(folder, cls=BadOnTheLast, **settings)
    try:
        run.train()
    except FloatingPointError as error:
        out["error"] = str(error)
    torch.save(out, f"{folder}/rank{run.accelerator.process_index}.pt")


def process(rank: int, folder: str) -> None:
    """What a launcher starts, with its variables."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    with ending_process_group():
        main(folder)
        not_finite(folder)


def two_processes(folder: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    # The Trainer's full collections need not look through what was imported.
    gc.collect()
    gc.freeze()
    start_processes(process, (folder,), nprocs=2, start_method="fork")


if __name__ == "__main__":
    two_processes(sys.argv[1])
