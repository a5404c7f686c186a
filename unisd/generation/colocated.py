"""vLLM in the trainer's process: is it there, and can TRL load the trained weights into it."""

from __future__ import annotations

import importlib.util
from typing import Any


def ready_vllm(args: Any) -> None:
    """Before TRL makes the sampler of a run: see that there is vLLM, and that its weights can be replaced.

    vLLM's CPU backend hands the weight of each linear layer to oneDNN (or to its kernel for AMX) when it has loaded
    it, and leaves an empty tensor in its place. TRL's synchronization then fails ("'Parameter' object has no attribute
    'weight_loader'"). On a CPU vLLM is told here, for this process, that it has neither: its layers are then PyTorch's
    products of weights that stay where they are. Nothing changes on other devices.

    Args:
        args: a `trl.DistillationConfig`.

    Raises:
        ValueError: vLLM is not installed.
    """
    if not args.use_vllm:
        return
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "use_vllm=True needs the package vllm: pip install vllm (docs/vllm.md says which), or leave use_vllm out "
            "to sample with transformers"
        )
    if args.vllm_mode != "colocate":
        return
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        import vllm._custom_ops
        import vllm.model_executor.layers.utils

        vllm._custom_ops._supports_onednn = False
        vllm.model_executor.layers.utils.check_cpu_sgl_kernel = lambda *shape: False
