"""`--device` of the commands."""

from __future__ import annotations

import torch

from unisd.cli.errors import CommandError


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where it is there, else the CPU.

    Raises:
        CommandError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"--device {name}: there is no such device here ({str(error)[:60]})") from None
    return device
