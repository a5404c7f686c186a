"""Groups of processes that train, save and resume under DDP or FSDP2 on gloo, all forked from one that has imported.

    python -m tests.trainer.sharded_worker FOLDER ENGINE KIND,KIND,... PART,PART,...

A part is "alone" or "long" (one process, no engine; 5 or 7 steps), "train" (2 ranks), "resume1", "resume2" and
"resume3" (so many ranks, from the checkpoint of step 3 of "train"), "universal1" and so on (the same, from what
DeepSpeed makes of it for any number), "kill-WHEN" (2 ranks, of which the second is killed, then 2 that resume), or
"masked" and "masked-alone" (no token of the second half of the rows counts; an evaluation on three rows). Each part
writes FOLDER/KIND/PART.json: losses and drift.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

from tests.trainer import tiny_run
from unisd.run.checkpoints import newest_complete
from unisd.run.processes import ending_process_group
from unisd.teachers.base import EMATeacher

STEPS, SAVED = 5, 3
AVERAGE = {"sync_steps": 1, "ema_decay": 0.5}
LORA = {"peft_config": tiny_run.lora(), "learning_rate": 0.005}
KINDS: dict[str, dict[str, Any]] = {
    "full": {"ema": "full", **AVERAGE},
    "full-tied": {"ema": "full", "tied": True, **AVERAGE},
    "base": {"ema": "none", "teacher": "base"},
    "adapter": {"ema": "adapter", **AVERAGE, **LORA},
    "merged": {"ema": "merged", **AVERAGE, **LORA},
    "adapter-head": {"ema": "adapter", **AVERAGE, **LORA, "peft_config": tiny_run.lora(modules_to_save=["lm_head"])},
    "lora-base": {"ema": "none", "teacher": "base", **LORA},
    "self": {"ema": "none"},
    "gpt2": {"ema": "full", "model": tiny_run.gpt2, **AVERAGE},
    "accumulated": {"ema": "full", "gradient_accumulation_steps": 2, **AVERAGE},
}
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
ALONE = ("alone", "long", "masked-alone")
MASKED = ("masked-alone", "masked")
ENGINES = {"ddp": {}, "fsdp2": FSDP, "zero2": ZERO, "zero3": ZERO, "zero3-kept": ZERO}
# Of DeepSpeed's config. By default ZeRO-3 keeps all weights of a model this small gathered; with 40 its norms alone.
STAGES: dict[str, dict[str, Any]] = {
    "zero2": {"stage": 2},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 40},
    "zero3-kept": {"stage": 3},
}


def trainer(folder: Path, kind: str, processes: int, cls: type = tiny_run.FixedRollouts, **overrides: Any) -> Any:
    settings = {**KINDS[kind]}
    tied, accumulation = settings.pop("tied", False), settings.get("gradient_accumulation_steps", 1)
    model = settings.pop("model", lambda: tiny_run.llama(tie_word_embeddings=tied))()
    settings = {
        "preset": "contrastive",
        "max_steps": STEPS,
        "per_device_train_batch_size": 6 // processes,
        "optim": "adamw_torch",
        "learning_rate": 0.005,
        "save_strategy": "steps",
        "save_steps": SAVED,
        "drift_probe": tiny_run.PROBE,
        "drift_probe_every": 2,
        **settings,
        **overrides,
    }
    return tiny_run.trainer(folder, model=model, items=tiny_run.rows(count=6 * accumulation), cls=cls, **settings)


def deepspeed_config(path: Path, stage: dict[str, Any], universal: bool) -> dict[str, str]:
    """Write DeepSpeed's config; the variable that names it."""
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = {**stage, "stage3_gather_16bit_weights_on_model_save": True}
    config = {**dict.fromkeys(auto, "auto"), "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    if universal:
        config["checkpoint"] = {"load_universal": True}
    path.write_text(json.dumps(config))
    return {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}


def record(run: Any, path: Path, **more: str) -> None:
    names = {"losses": "loss", "evaluated": "eval_loss", "drift": "unisd/drift_kl"}
    content: dict[str, Any] = {name: tiny_run.logged(run, logged) for name, logged in names.items()}
    if isinstance(run.teacher, EMATeacher):
        content["held"] = sum(getattr(t, "_local_tensor", t).numel() for t in run.teacher.tensors().values())
    if run.accelerator.is_main_process:
        content |= more
        content["type"] = str(run.accelerator.distributed_type)
        path.write_text(json.dumps(content))


class SecondHalfCutOff(tiny_run.FixedRollouts):
    """Completions of the second half of the rows never end, so that none of their tokens counts: all of rank 1's."""

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        completions = super()._generate_single_turn(prompt_ids)
        alone = self.accelerator.num_processes == 1
        first = len(completions) // 2 if alone else len(completions) * (1 - self.accelerator.process_index)
        return completions[:first] + [[7] * self.args.max_completion_length] * (len(completions) - first)


def kill_in(when: str) -> type:
    """A trainer whose second rank is killed in the step after the checkpoint of step 3, or in the next save before it
    writes its part of the average, the optimizer's state, or the state of the random numbers, which comes last."""

    class Killed(tiny_run.FixedRollouts):
        def _end(self, now: str, step: int) -> None:
            if (now, step, self.accelerator.process_index) == (when, self.state.global_step, 1):
                os.kill(os.getpid(), signal.SIGKILL)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            self._end("step", SAVED + 1)
            return super().training_step(*args, **kwargs)

        def write_beside(self, folder: str) -> None:
            self._end("average", 2 * SAVED)
            super().write_beside(folder)

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            self._end("optimizer", 2 * SAVED)
            super()._save_optimizer_and_scheduler(output_dir)

        def _save_rng_state(self, output_dir: str) -> None:
            self._end("rng", 2 * SAVED)
            super()._save_rng_state(output_dir)

    return Killed


def process(rank: int, processes: int, base: Path, kinds: list[str], part: str) -> None:
    """One rank of a part, with a launcher's variables."""
    alone = part in ALONE
    os.environ |= {} if alone else {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    with nullcontext() if alone else ending_process_group():
        for kind in kinds:
            folder = base / kind
            if part.startswith("kill"):
                cls, folder = kill_in(part.removeprefix("kill-")), base / kind / part
                trainer(folder, kind, processes, cls, max_steps=7, save_total_limit=1).train()
            elif part in MASKED:
                masked = {"mask_truncated_completions": True, "save_strategy": "no", "max_steps": 3}
                run = trainer(folder / part, kind, processes, SecondHalfCutOff, per_device_eval_batch_size=1, **masked)
                run.train()
                # Three rows on two ranks: one has a batch more, which the other has to make up.
                run.evaluate(tiny_run.dataset(tiny_run.rows(count=3)))
                record(run, folder / f"{part}.json")
            elif part.startswith("after"):
                folder = base / kind / part.removeprefix("after-")
                run = trainer(folder, kind, processes, max_steps=7)
                resumed_from = newest_complete(folder)
                run.train(resume_from_checkpoint=True)
                record(run, base / kind / f"{part}.json", resumed_from=str(resumed_from))
            else:
                out = folder / ("run" if part == "train" else part)
                run = trainer(out, kind, processes, max_steps=7 if part == "long" else STEPS)
                run.train(
                    resume_from_checkpoint=str(folder / f"run/checkpoint-{SAVED}") if part[-1].isdigit() else None
                )
                if part in ("alone", "train"):
                    run.save_finished()
                record(run, folder / f"{part}.json")
            del run


def make_universal(checkpoint: Path) -> None:
    """Convert a checkpoint of DeepSpeed into one that any number of processes resumes, beside it."""
    if (checkpoint / "latest_universal").is_file():
        return
    saved = checkpoint / f"global_step{SAVED}"
    options = ["--input_folder", saved, "--output_folder", f"{saved}_universal"]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    subprocess.run([sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *options, *workers], check=True)


def group(part: str, base: Path, kinds: list[str], engine: str) -> None:
    processes = 1 if part in ALONE else int(part[-1]) if part[-1].isdigit() else 2
    before = dict(os.environ)
    if part.startswith("universal"):
        for kind in kinds:
            make_universal(base / kind / f"run/checkpoint-{SAVED}")
    if part not in ALONE:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **ENGINES[engine]}
        os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        if engine in STAGES:
            os.environ |= deepspeed_config(base / "deepspeed.json", STAGES[engine], part.startswith("universal"))
    try:
        start_processes(process, (processes, base, kinds, part), nprocs=processes, start_method="fork")
    finally:
        os.environ.clear()
        os.environ.update(before)


def main(base: Path, engine: str, kinds: list[str], parts: list[str]) -> None:
    for kind in kinds:
        (base / kind).mkdir(parents=True, exist_ok=True)
    gc.collect()
    gc.freeze()
    for part in parts:
        try:
            group(part, base, kinds, engine)
            assert not part.startswith("kill"), "no rank was killed"
        except (ProcessExitedException, ProcessRaisedException):
            # Which of them is seen first is chance: the kill, or the other rank's lost connection.
            if not part.startswith("kill"):
                raise
            group(f"after-{part}", base, kinds, engine)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(","), sys.argv[4].split(","))
