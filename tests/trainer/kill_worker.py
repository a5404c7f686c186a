"""A run that is killed at chosen moments and resumed, in children of one process.

    python -m tests.trainer.kill_worker FOLDER COUNT

prints as JSON the losses and the digest of the weights of an undisturbed run, and of runs that were killed, one at each
of COUNT moments (0: at all there are) spread over it, and resumed. A moment is an event of the files under the run's
folder (opened to be written, renamed, deleted, made), or "rollout", in the middle of one. SIGKILL comes from within it.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from tests.trainer import tiny_run
from unisd.trainer import UniSDTrainer

_EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


class Watch:
    """Count of the events under a folder; at number `kill_at` the process ends."""

    def __init__(self, folder: Path, kill_at: int | None) -> None:
        self._folder, self._kill_at = str(folder), kill_at
        self.count = 0
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)):
                return
        elif event in _EVENTS:
            path = args[0]
        else:
            return
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self._folder):
            if self.count == self._kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1


class KilledInRollout(UniSDTrainer):
    """Ends in the middle of the rollout of the fourth step."""

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._generate_single_turn(*args, **kwargs)


def run(folder: Path, cls: type[UniSDTrainer] = UniSDTrainer, resume: bool = False) -> dict[str, Any]:
    """Train five steps with a checkpoint after every second one, of which one is kept."""
    trainer = tiny_run.trainer(
        folder,
        cls=cls,
        items=tiny_run.rows(count=8),
        preset="unisd_star",
        per_device_train_batch_size=2,
        max_steps=5,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        sync_steps=2,
        optim="adamw_torch",
        learning_rate=0.01,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder))
    digest = hashlib.sha256()
    for _, parameter in sorted(trainer.model.named_parameters()):
        digest.update(parameter.detach().numpy().tobytes())
    return {"losses": tiny_run.losses(trainer), "digest": digest.hexdigest()}


def in_child(function: Any) -> tuple[int, Any]:
    """Signal that ended a forked child (0 for none), and what `function()` returned in it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            with os.fdopen(writing, "w") as stream:
                json.dump(function(), stream)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    status = os.waitpid(pid, 0)[1]
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), (json.loads(text) if text else None)


def undisturbed(folder: Path) -> dict[str, Any]:
    watch = Watch(folder, None)
    return {**run(folder), "moments": watch.count}


def killed(folder: Path, moment: str) -> None:
    if moment == "rollout":
        run(folder, KilledInRollout)
    else:
        Watch(folder, int(moment))
        run(folder)


def resumed(folder: Path) -> dict[str, Any]:
    from unisd.run.checkpoints import newest_complete

    return run(folder, resume=newest_complete(folder) is not None)


def main() -> None:
    torch.set_num_threads(1)
    # The Trainer's full collections of each child need not look through what was imported: half of the child's time.
    gc.collect()
    gc.freeze()
    base, count = sys.argv[1], int(sys.argv[2])
    whole = in_child(lambda: undisturbed(Path(base) / "undisturbed"))[1]
    total = whole["moments"]
    chosen = range(total) if count == 0 else sorted({place * (total - 1) // (count - 1) for place in range(count)})
    results = {}
    for moment in [*map(str, chosen), "rollout"]:
        folder = Path(base) / f"killed-{moment}"
        ended_by, _ = in_child(lambda folder=folder, moment=moment: killed(folder, moment))
        results[moment] = {"ended_by": ended_by, **(in_child(lambda folder=folder: resumed(folder))[1] or {})}
    print(json.dumps({"whole": whole, "killed": results}))


if __name__ == "__main__":
    main()
