"""One process of a data-parallel run: trains two steps a setting and saves the weights. Run by test_trainer_ddp."""

import os
import sys

import torch

from tests.trainer import tiny_run

RESULT = "result.pt"
SETTINGS = {
    "sequence": {"preset": "contrastive", "ema": "full", "sync_steps": 1},
    "token": {"preset": "sdft", "normalization": "token"},
}


def main(folder: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    out = {}
    for name, settings in SETTINGS.items():
        run = tiny_run.trainer(
            folder,
            per_device_train_batch_size=tiny_run.NUM_ROWS // processes,
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
        }
    if run.accelerator.is_main_process:
        torch.save(out, f"{folder}/{RESULT}")


if __name__ == "__main__":
    main(sys.argv[1])
