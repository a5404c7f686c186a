"""A processor as figures are filed under it: what tells two of them apart, a folder's name, a heading.

A virtual machine may say no more than "AMD EPYC". So family and model stand beside the name, and the widest
instructions for products that the system lets a program use, since one may be hidden.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unisd_kernels.processor import processor_name

_CPUINFO = Path("/proc/cpuinfo")
_NODES = Path("/sys/devices/system/node")
# By how they change the speed of a product, best first: Linux's flags.
WIDEST = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "bf16", "asimd")
_NOISE = ("cpu", "processor", "r", "tm")


def processor() -> dict[str, Any]:
    """Name, family, model, widest instructions, cores and memory nodes of this machine, for an environment."""
    fields = _first_entry(_CPUINFO.read_text(encoding="utf-8")) if _CPUINFO.exists() else {}
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "name": processor_name(),
        # An ARM processor has an implementer and a part in their place.
        "family": fields.get("cpu family", fields.get("CPU implementer")),
        "model": fields.get("model", fields.get("CPU part")),
        "instructions": [name for name in WIDEST if name in flags],
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "numa_nodes": len(list(_NODES.glob("node[0-9]*"))) or 1,
    }


def multiplies_bfloat16() -> bool:
    """Whether its cores multiply such operands as they are, and not by way of float32."""
    return any(name in ("amx_bf16", "avx512_bf16", "bf16") for name in processor()["instructions"])


def _first_entry(text: str) -> dict[str, str]:
    """The fields of the first processor of /proc/cpuinfo."""
    lines = text.split("\n\n", 1)[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def slug(environment: Mapping[str, Any]) -> str:
    """The folder of a processor's results: "amd-epyc-f25-m17-avx512-bf16"."""
    words = [word for word in re.findall(r"[a-z0-9]+", environment["cpu"].lower()) if word not in _NOISE]
    about = environment.get("processor", {})
    if about.get("family") and about.get("model"):
        words += [f"f{about['family']}", f"m{about['model']}"]
    return "-".join([*words, *_widest(environment).lower().split("_")])


def title(environment: Mapping[str, Any]) -> str:
    """The processor in a heading: "AMD EPYC (family 25, model 17, AVX512_BF16)"."""
    about = environment.get("processor", {})
    numbers = [f"{name} {about[name]}" for name in ("family", "model") if about.get(name)]
    return f"{environment['cpu']} ({', '.join([*numbers, _widest(environment)])})"


def _widest(environment: Mapping[str, Any]) -> str:
    """The first of its instructions; files of before there was a list have torch's word for them."""
    instructions = environment.get("processor", {}).get("instructions")
    return (instructions[0] if instructions else environment["instruction_set"]).upper()
