"""Four processes over gloo: losses on slices of a vocabulary, and a model that transformers' `tp_plan` has cut.

    python -m tests.distributed.gloo_worker FOLDER [everything | fsdp]

forks them once everything is imported, and each saves what it found in the folder. Other plans than transformers' own
cut the model of tied weights only with `everything`."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing import start_processes
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from tests.distributed.slices import EVERYTHING, V, limits, loss_of, sliced, whole_problem
from unisd_kernels import LMHead, available, unisd_loss
from unisd_kernels.heads.causal_model import head_parts

PROCESSES = 4
NATIVE = "native" if available("cpu")["native"] else "torch"
# Name -> (dtype, settings of the problem, options of the loss).
CASES: dict[str, tuple[torch.dtype, dict[str, Any], dict[str, Any]]] = {
    "float64, trainable, JSD": (torch.float64, {"softcap": 8.0}, {"beta": 0.5, "clip_quantile": 0.6, "impl": "torch"}),
    "float64, frozen, KL": (
        torch.float64,
        {"shared_head": True, "frozen_head": True},
        {"beta": 0.0, "clip_cap": 0.4, "impl": "torch"},
    ),
    "float64, trainable, reverse KL": (torch.float64, {"bias": False}, {"beta": 1.0, "impl": "torch"}),
    "float32, trainable": (torch.float32, {"shared_head": True}, {"beta": 0.0, "impl": NATIVE}),
    "bfloat16, frozen": (torch.bfloat16, {"shared_head": True, "frozen_head": True}, {"beta": 0.5, "impl": NATIVE}),
}


# What a plan may say of the head besides transformers' own, and a plan that leaves all but the head whole.
PLANS = {
    "colwise_rep": {"lm_head": "colwise_rep"},
    "the head alone": {
        "lm_head": "colwise_rep",
        **{f"model.layers.*.self_attn.{part}_proj": "replicate" for part in "qkvo"},
        **{f"model.layers.*.mlp.{part}_proj": "replicate" for part in ("gate", "up", "down")},
    },
}


def options_of(name: str) -> dict[str, Any]:
    return {**EVERYTHING, **CASES[name][2]}


def problem_of(name: str):
    """In float64, of numbers that the case's dtype holds."""
    dtype, settings, _ = CASES[name]
    return whole_problem(dtype, **settings)


def losses_on_slices(rank: int) -> dict[tuple[int, str], Any]:
    found = {}
    for ranks in range(1, PROCESSES + 1):
        group = distributed.new_group(list(range(ranks)))
        if rank < ranks:
            for name, (dtype, _, _) in CASES.items():
                own = sliced(problem_of(name).to(dtype), rank, group, limits(V, ranks))
                found[ranks, name] = loss_of(own, **options_of(name))
    return found


def save_tiny_model(folder: str, tied: bool) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).to(torch.float64).save_pretrained(folder)


def load(folder: str, **parallel: Any):
    config = {"distributed_config": DistributedConfig(**parallel)} if parallel else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **config)


def two_steps(model) -> dict[str, Any]:
    """Two steps of self-distillation with every mechanism: losses, and the weights they end with."""
    generator = torch.Generator().manual_seed(1)
    contexts = torch.randint(0, V, (5, 3, 4), generator=generator)
    answer = torch.randint(0, V, (3, 6), generator=generator)
    cu_seqlens = torch.arange(0, 19, 6)

    def hidden_under(context: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([context, answer], 1)
        return model.model(input_ids=ids, use_cache=False).last_hidden_state[:, 3:-1].flatten(0, 1)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    head, losses = LMHead.from_model(model), []
    for _ in range(2):
        with torch.no_grad():
            teacher, negative, *auxiliary = (hidden_under(context) for context in contexts[1:])
        result = unisd_loss(
            hidden_under(contexts[0]),
            head,
            teacher,
            head.detach(),
            answer.flatten(),
            cu_seqlens,
            auxiliary_hidden=auxiliary,
            negative_hidden=negative,
            clip_quantile=0.9,
            **EVERYTHING,
        )
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        losses.append(float(result.loss.detach()))
    weights = {
        name: (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach().clone()
        for name, weight in model.named_parameters()
    }
    slice_rows = None if head.group is None else (head.vocab_start, head.weight.shape[0])
    return {"losses": losses, "weights": weights, "slice": slice_rows}


def scaled_behind_the_head(model) -> str:
    """What `from_model` says of a model that scales its logits without a word in its configuration."""
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: forward(hidden) * 1.7
    try:
        LMHead.from_model(model)
    except ValueError as error:
        return str(error)
    finally:
        model.lm_head.forward = forward
    return ""


def fully_sharded(folder: str) -> dict[str, Any]:
    """What a head is under FSDP2, whose ranks have other tokens."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = load(folder)
    fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)))
    parts = head_parts(model)
    return {"shape": tuple(parts.weight.shape), "group": parts.group, "is": type(model.lm_head.weight).__name__}


def tokens_of(copy: int) -> tuple[torch.Tensor, ...]:
    """Hidden states of student and teacher, and targets: other ones on each copy of the model."""
    generator = torch.Generator().manual_seed(copy)
    student, teacher = torch.randn(2, 7, 16, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher, torch.randint(0, V, (7,), generator=generator)


def loss_of_head(head: LMHead, copy: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss, whose gradient has been taken, and that of the hidden states."""
    student, teacher, targets = tokens_of(copy)
    result = unisd_loss(student, head, teacher, head.detach(), targets, torch.tensor([0, 3, 7]), beta=0.5)
    result.loss.backward()
    return result.loss.detach(), student.grad


def on_meshes(folder: str, rank: int) -> dict[str, Any]:
    """Heads on 2 x 2 ranks, of which each pair has the vocabulary and tokens of its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    found: dict[str, Any] = {}

    def describe(name: str, head: LMHead, weight: Any = None) -> None:
        loss, gradient = loss_of_head(head, copy)
        found[name] = {
            "slice": (head.vocab_start, head.weight.detach().clone()),
            "bias": None if head.bias is None else head.bias.detach().clone(),
            "ranks": distributed.get_process_group_ranks(head.group),
            "loss": loss,
            "hidden": gradient,
            "weight": None if weight is None else weight.grad.to_local(),
        }

    copy = rank // 2
    for names in (("dp", "tp"), None):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        model = load(folder)
        for name in ("weight", "bias"):
            whole = model.lm_head.weight.detach() if name == "weight" else torch.linspace(-1, 1, V, dtype=torch.float64)
            cut = distribute_tensor(whole, mesh, [Replicate(), Shard(0)])
            model.lm_head.register_parameter(name, torch.nn.Parameter(cut))
        describe(f"replicated, {names}", LMHead.from_model(model, verify=False), model.lm_head.weight)
    # FSDP2 and tensor parallelism, as transformers loads them: in shards, and as modules have it while they run.
    model = load(folder, tp_size=2, fsdp_size=2)
    found["placements"] = [type(placement).__name__ for placement in model.lm_head.weight.placements]
    describe("in shards", LMHead.from_model(model))
    model.lm_head.unshard()
    describe("gathered", LMHead.from_model(model, verify=False))
    return found


def process(rank: int, folder: str, planned: tuple[str, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    found: dict[str, Any] = {"losses": losses_on_slices(rank)}
    for kind in ("untied", "tied"):
        model = load(f"{folder}/{kind}", tp_size=PROCESSES)
        if kind == "untied":
            found["scaled"] = scaled_behind_the_head(model)
        found[kind] = two_steps(model)
        for name, plan in PLANS.items() if kind in planned else ():
            found[f"{kind}, {name}"] = two_steps(load(f"{folder}/{kind}", tp_size=PROCESSES, tp_plan=plan))
    found["meshes"] = on_meshes(f"{folder}/untied", rank)
    torch.save(found, f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()


def fsdp_process(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    torch.save(fully_sharded(f"{folder}/untied"), f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()


def main(folder: str, what: str = "") -> None:
    torch.set_num_threads(1)
    if what == "fsdp":
        save_tiny_model(f"{folder}/untied", tied=False)
        start_processes(fsdp_process, (folder,), nprocs=PROCESSES, start_method="fork")
        return
    alone = {}
    for kind in ("untied", "tied"):
        save_tiny_model(f"{folder}/{kind}", kind == "tied")
        alone[kind] = two_steps(load(f"{folder}/{kind}"))
    torch.save(alone, f"{folder}/alone.pt")
    planned = ("untied", "tied") if what == "everything" else ("untied",)
    start_processes(process, (folder, planned), nprocs=PROCESSES, start_method="fork")


if __name__ == "__main__":
    main(*sys.argv[1:])
