"""Output folders of `unisd train` and `unisd prepare`: not somebody else's, and such that they can be written."""

from __future__ import annotations

import tempfile
from pathlib import Path

from unisd.cli.errors import CommandError
from unisd.run.checkpoints import is_checkpoint


def claim_output_dir(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise CommandError if `folder` holds anything that the run would write over unasked.

    Args:
        resume: the run goes on from a checkpoint in it.
        overwrite: write over it. Checkpoints of the earlier run would be taken for this one's at the next resume, and
            its evaluations for this one's wherever runs are shown, so the caller removes them.
    """
    if resume and overwrite:
        raise CommandError("--resume and --overwrite_output_dir exclude each other")
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"output_dir {folder} is a file")
    entries = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    checkpoints = [entry for entry in entries if is_checkpoint(folder / entry)]
    if resume:
        return
    if entries and not overwrite:
        held = f"{len(checkpoints)} checkpoints" if checkpoints else f"{entries[0]!r}"
        raise CommandError(
            f"output_dir {folder} is not empty (it holds {held}): give --resume to go on from its newest checkpoint, "
            "--overwrite_output_dir to replace the run, or another --output_dir"
        )


def make_writable(folder: Path, name: str) -> None:
    """Make the folder and raise CommandError if no file can be written into it: told now, not after rows were prepared
    and a model was loaded.

    Args:
        name: of the flag, for the message.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(f"{folder} cannot be written to ({error.strerror}): give another {name}") from None
