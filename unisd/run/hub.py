"""The finished run on the hub: pushed when everything is saved, so that a push that fails costs nothing."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi

from unisd.teachers.checkpoint import STATE_FILE, STATE_FOLDER

if TYPE_CHECKING:
    from unisd.run.checkpointed import CheckpointedTrainer

LEFT_OUT = (
    "_*",
    "checkpoint-*",
    "completions/*",  # texts of the rows
    "nonfinite/*",
    "training_args.bin",  # every setting, pickled: a token and this machine's paths too
    STATE_FILE,
    f"{STATE_FOLDER}/*",
)
"""Patterns of what stays on this machine."""


def push_run(trainer: CheckpointedTrainer) -> str | None:
    """Upload the saved model, tokenizer, card and settings from the run's folder.

    Returns:
        URL of the commit; None on processes that push nothing.

    Raises:
        OSError: whatever went wrong, with where the run is and how to push it later.
    """
    if not trainer.is_world_process_zero():
        return None
    args: Any = trainer.args
    repository = trainer.hub_model_id
    try:
        trainer._finish_current_push()  # of a checkpoint, in the background
        commit = HfApi(token=args.hub_token).upload_folder(
            repo_id=str(repository),
            folder_path=str(args.output_dir),
            commit_message="End of training",
            revision=args.hub_revision,
            ignore_patterns=list(LEFT_OUT),
        )
    except Exception as error:  # of the network, the hub, the disk: whatever it is, the run is not lost
        left_out = " ".join(f"--exclude '{pattern}'" for pattern in LEFT_OUT)
        raise OSError(
            f"the run is saved in {args.output_dir}, but it could not be pushed ({_first_line(error)}); later: "
            f"hf upload {repository} {args.output_dir} . {left_out}"
        ) from error
    return str(commit.commit_url)


def keep_token_out(args: Any) -> None:
    """Hand a `hub_token` to the hub's client by its environment variable: transformers pickles all settings into each
    checkpoint, and pushes them."""
    if args.hub_token:
        os.environ["HF_TOKEN"], args.hub_token = args.hub_token, None


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]:.150}" if text else type(error).__name__
