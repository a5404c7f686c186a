"""An error in a run of several processes: one of them tells of it."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

# What gloo and NCCL say when the other end is gone.
_LOST = re.compile(r"Connection (closed|reset) by peer|gloo/transport|Broken pipe|NCCL.*(remote|abort)", re.IGNORECASE)


@cache
def is_first_to_fail() -> bool:
    """Whether this process is the first of its launcher's on this machine to ask, which an error makes it do: what
    ends one ends all, and one of them tells. Asked before the process group ends, since that fails the others.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # of torchrun and of what starts it: a folder a process
    if error_file is None or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    try:
        (Path(error_file).parents[1] / "unisd_failed").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def is_lost_connection(error: BaseException) -> bool:
    """Whether it says that another process of the group is gone."""
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
