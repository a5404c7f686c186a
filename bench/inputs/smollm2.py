"""Hidden states of a real model: those of SmolLM2-135M-Instruct under the contexts of the procedural tasks.

Random hidden states have broad distributions and large divergences. Real ones have peaked distributions, and a
demonstration changes most of them little; implementations differ in speed and in accuracy on such data.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unisd.completions import EncodedPair, encode_pairs, hidden_rows, scoring_batches
from unisd.data.procedural import procedural_rows
from unisd.models import SMOLLM2, fetch_model, load_model
from unisd.modules import scoring_mode
from unisd.turns import Prompt
from unisd_kernels import LMHead, linear_divergence, linear_logprobs
from unisd_kernels.cache import cache_directory
from unisd_kernels.config import LossInputs
from unisd_kernels.files import replacing

# Part of the file's name: to be raised with every change of what is computed.
VERSION = 1
BATCH_SIZE = 8


def real_views(
    num_rows: int,
    num_auxiliary: int,
    device: torch.device,
    seed: int = 0,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
) -> LossInputs:
    """N completion tokens of B packed sequences under K + 3 contexts, of the first procedural tasks of a seed.

    Hidden states are float32 [N, H], after the final norm: the student's after the question alone, the teacher's with
    the task's own correct reply as a demonstration, the negative view's with a plausible wrong one, and K auxiliary
    views, each after another task with its correct reply. Both heads are the model's, [V, H] without bias, scale or
    cap. The targets are correct replies, each ending with EOS (but for the last sequence, which is cut to give N rows).

    They are computed once and kept on disk.

    The first call computes on `device` (on a CPU this takes minutes for thousands of rows) and writes one file of
    4 N H (K + 3) bytes. Later calls read it, whatever their device, and give the same bits.

    Args:
        num_rows: N >= 1.
        num_auxiliary: K >= 0.
        device: of the result.
        seed: another seed gives other tasks.
        cache_dir: folder of the file; None for `bench-inputs` in the user's cache. The model stays where it is.

    Raises:
        ValueError: `num_rows` or `num_auxiliary` out of range.
        RuntimeError, ValueError: the model is not in the user's cache and cannot be fetched (`fetch_model`).
    """
    if num_rows < 1 or num_auxiliary < 0:
        raise ValueError(f"num_rows must be at least 1 and num_auxiliary at least 0, got {num_rows}, {num_auxiliary}.")
    folder = cache_directory() / "bench-inputs" if cache_dir is None else Path(cache_dir).expanduser()
    path = folder / f"smollm2-n{num_rows}-k{num_auxiliary}-seed{seed}-v{VERSION}.pt"
    model_folder = fetch_model(SMOLLM2)
    if not path.is_file():
        tensors = _compute(model_folder, num_rows, num_auxiliary, device, seed)
        with replacing(path) as new:
            torch.save(tensors, new)
    # Not mapped from the file, so that every tensor has memory of its own, aligned as torch aligns it.
    tensors = torch.load(path, map_location=device, weights_only=True)
    head = LMHead(_head_weight(model_folder).to(device))
    tensors["auxiliary_hidden"] = tuple(tensors["auxiliary_hidden"])
    return LossInputs(student_head=head, teacher_head=head, **tensors)


def describe(views: LossInputs, temperature: float) -> dict[str, float]:
    """Character of the data, in nats: forward KL of a token (median and 90th percentile) and mean teacher entropy."""
    head = views.student_head
    divergence = linear_divergence(views.student_hidden, head, views.teacher_hidden, head, temperature=temperature)
    scores = linear_logprobs(views.teacher_hidden, head, views.target_ids, temperature=temperature, return_entropy=True)
    assert scores.entropy is not None
    return {
        "forward_kl_median": float(divergence.quantile(0.5)),
        "forward_kl_p90": float(divergence.quantile(0.9)),
        "teacher_entropy_mean": float(scores.entropy.mean()),
    }


def _compute(model_folder: Path, num_rows: int, num_auxiliary: int, device: torch.device, seed: int) -> dict[str, Any]:
    model, tokenizer = load_model(model_folder)
    model.to(device)
    completions = _completions(tokenizer, num_rows, seed)
    rows = procedural_rows(len(completions), seed=seed, num_auxiliary=num_auxiliary)

    def hidden(name: str, prompts: Sequence[Prompt]) -> torch.Tensor:
        print(f"bench: real inputs (once): {name}, {num_rows} rows", file=sys.stderr, flush=True)
        encoded = encode_pairs(tokenizer, prompts, [row["completion"] for row in rows])
        pairs = [replace(pair, completion_ids=ids) for pair, ids in zip(encoded, completions, strict=True)]
        return _hidden_states(model, pairs, device)

    lengths = torch.tensor([0, *map(len, completions)])
    return {
        "student_hidden": hidden("student", [row["prompt"] for row in rows]),
        "teacher_hidden": hidden("teacher", [row["teacher_prompt"] for row in rows]),
        "negative_hidden": hidden("negative", [row["negative_prompt"] for row in rows]),
        "auxiliary_hidden": [
            hidden(f"auxiliary {k + 1} of {num_auxiliary}", [row["auxiliary_prompts"][k] for row in rows])
            for k in range(num_auxiliary)
        ],
        "target_ids": torch.tensor([token for ids in completions for token in ids]),
        "cu_seqlens": lengths.cumsum(0).to(torch.int32),
    }


def _completions(tokenizer: Any, num_rows: int, seed: int) -> list[list[int]]:
    """Token ids of the replies of the first tasks, as many as give `num_rows` tokens; the last one is cut."""
    count, total = 0, 0
    while total < num_rows:
        # A reply of the default tasks has about 32 tokens. The first tasks do not depend on how many there are.
        count += max(1, (num_rows - total) // 32)
        rows = procedural_rows(count, seed=seed, num_auxiliary=0)
        pairs = encode_pairs(tokenizer, [row["prompt"] for row in rows], [row["completion"] for row in rows])
        total = sum(len(pair.completion_ids) for pair in pairs)
    completions: list[list[int]] = []
    left = num_rows
    for pair in pairs:
        if left == 0:
            break
        completions.append(pair.completion_ids[:left])
        left -= len(completions[-1])
    return completions


def _hidden_states(model: Any, pairs: Sequence[EncodedPair], device: torch.device) -> torch.Tensor:
    """[N, H] on the CPU, in the order of the pairs."""
    parts: dict[int, torch.Tensor] = {}
    with scoring_mode(model):
        for batch in scoring_batches(pairs, BATCH_SIZE, device):
            parts.update(zip(batch.indices, hidden_rows(model, batch).cpu().split(batch.lengths), strict=True))
    return torch.cat([parts[place] for place in range(len(pairs))])


def _head_weight(model_folder: Path) -> torch.Tensor:
    """The head alone: the whole model in memory would blur what is measured next."""
    from safetensors import safe_open

    with safe_open(model_folder / "model.safetensors", framework="pt") as tensors:
        tied = "lm_head.weight" not in tensors.keys()  # noqa: SIM118 (not a dictionary)
        # A copy: what is read may be mapped from the file.
        return tensors.get_tensor("model.embed_tokens.weight" if tied else "lm_head.weight").clone()
