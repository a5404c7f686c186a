"""Per-user cache directory."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """`$UNISD_CACHE`, else `$XDG_CACHE_HOME/unisd`, else `~/.cache/unisd`."""
    if os.environ.get("UNISD_CACHE"):
        return Path(os.environ["UNISD_CACHE"]).expanduser()
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]).expanduser() / "unisd"
    return Path.home() / ".cache" / "unisd"
