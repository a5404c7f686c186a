"""One candidate of a product kernel timed at a time, so that one that fails costs nothing but itself.

`choose` of backends/triton/configs.py times all candidates of a kind and raises with the first that fails. Here it is
given a table of one. Its private memory of winners has to be emptied for that, hence a module of its own.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from unisd_kernels.backends.triton import configs
from unisd_kernels.backends.triton.configs import GemmConfig


@contextmanager
def _measuring() -> Iterator[None]:
    """`choose` measures and remembers nothing: neither from before, nor in the user's cache or this process after."""
    before = {name: os.environ.get(name) for name in ("UNISD_TRITON_AUTOTUNE", "UNISD_CACHE")}
    winners, measured = dict(configs._winners), dict(configs.measured)
    configs._winners.clear()
    configs.measured.clear()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(UNISD_TRITON_AUTOTUNE="1", UNISD_CACHE=folder)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
            for store, kept in ((configs._winners, winners), (configs.measured, measured)):
                store.clear()
                store.update(kept)  # type: ignore[arg-type]


@contextmanager
def only(kind: str, config: GemmConfig, device: torch.device) -> Iterator[None]:
    """The table holds this candidate alone; twice, because of one there is nothing to measure."""
    name = configs.architecture(device)
    table = configs.TABLE.get(configs._ALIASES.get(name, name), configs._AMPERE)
    before = table[kind]
    table[kind] = (config, config)
    try:
        yield
    finally:
        table[kind] = before


def milliseconds(kind: str, config: GemmConfig, device: torch.device, operate: Callable[[], object]) -> float:
    """Median of the launch that `operate` makes with this candidate, as `choose` measures it.

    Raises: what the launch raises; RuntimeError if `operate` asked for another kind.
    """
    with _measuring(), only(kind, config, device):
        operate()
        found = {key.split("/")[0]: times for key, times in configs.measured.items()}
    if kind not in found:
        raise RuntimeError(f"the operation asked for {', '.join(found) or 'no measurement'}, not for {kind}")
    return found[kind][config]
