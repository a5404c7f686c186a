"""Launching on several processes: configs for `accelerate launch` (ddp, fsdp2, zero2, zero3), and where they are."""

from pathlib import Path

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")


def config_file(engine: str) -> Path:
    """The file for `accelerate launch --config_file` of an engine of `ENGINES`."""
    return Path(__file__).with_name(f"{engine}.yaml")
