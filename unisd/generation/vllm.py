"""Replies with vLLM in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from unisd.generation.interface import Request, Sampling
from unisd.models import is_adapter, weights_stamp

# Where and in what portions it computes, which is no other reply.
_HOW_MUCH = (
    "cpu_offload_gb",
    "enforce_eager",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "pipeline_parallel_size",
    "tensor_parallel_size",
    "trust_remote_code",
)


class VLLMGenerator:
    """A `vllm.LLM`, which batches by itself; it is given many requests at a time.

    Args:
        model: folder or hub id.
        batch_size: requests of a call, whose replies are then stored.
        options: further arguments of `vllm.LLM` (`tensor_parallel_size`, `gpu_memory_utilization`, ...). Its dtype is
            "auto" by itself, which makes bfloat16 or float16 of a float32 checkpoint.

    Raises:
        ValueError: vLLM is not installed, or the folder is that of an adapter.
    """

    def __init__(self, model: str, batch_size: int = 256, **options: Any) -> None:
        if is_adapter(model):
            raise ValueError(
                f"{model} is a PEFT adapter, and the generator vllm reads whole models: merge it into its base first, "
                "or give --generator transformers"
            )
        try:
            import vllm
        except ModuleNotFoundError as error:
            if error.name != "vllm":
                raise
            raise ValueError(
                "the generator vllm needs the package vllm: pip install vllm, or give --generator transformers, or the "
                "URL of a server"
            ) from error
        self._vllm = vllm
        self._llm = vllm.LLM(model=model, **options)
        self.batch_size = batch_size
        changing = {name: value for name, value in options.items() if name not in _HOW_MUCH}
        self.identity: str = f"vllm:{weights_stamp(model)}" + (
            f" {json.dumps(changing, sort_keys=True, default=str)}" if changing else ""
        )

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """The requests in their order: vLLM schedules them itself."""
        places = list(range(len(requests)))
        return [places[start : start + self.batch_size] for start in range(0, len(places), self.batch_size)]

    def replies(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, str]]:
        for places in self.batches(requests):
            # Strings and conversations go through different calls.
            for form, call in ((str, self._llm.generate), (list, self._llm.chat)):
                chosen = [place for place in places if isinstance(requests[place].prompt, str) == (form is str)]
                if not chosen:
                    continue
                prompts = [form(requests[place].prompt) for place in chosen]
                outputs = call(
                    prompts, [self._parameters(requests[place], sampling) for place in chosen], use_tqdm=False
                )
                yield from ((place, out.outputs[0].text) for place, out in zip(chosen, outputs, strict=True))

    def _parameters(self, request: Request, sampling: Sampling) -> Any:
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            seed=request.seed % 2**31,  # what a server is given, so that both draw the same
        )
