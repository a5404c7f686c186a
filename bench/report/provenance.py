"""Where a figure comes from: the command, the machine, the versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def where(environment: Mapping[str, Any]) -> str:
    """One paragraph."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    when = environment.get("date", "")[:10]
    # Files of before there was one command line name its modules.
    command = environment["command"].replace("python -m bench.", "python -m bench ")
    return (
        f"`{command}`; {device(environment)}; Python {environment['python']}, {versions}; commit "
        f"{environment['commit']}{', ' + when if when else ''}."
    )


def device(environment: Mapping[str, Any]) -> str:
    """The processor with its threads, or the accelerator with its driver."""
    if environment["device"] != "cpu":
        return f"{environment['device']}, driver {environment['driver']}, CUDA {environment['cuda']}"
    parts = [environment["cpu"], environment["instruction_set"], f"{environment['threads']} threads"]
    about = environment.get("processor")
    if about:
        parts.append(f"{about['usable_cores']} of {about['cores']} cores, NUMA nodes: {about['numa_nodes']}")
    products = environment.get("products")
    if products:
        parts.append("products by " + ", ".join(f"{library} ({dtype})" for dtype, library in products.items()))
    return ", ".join(parts)
