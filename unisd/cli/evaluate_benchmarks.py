"""`unisd eval BENCHMARK ...`: a model on benchmarks, with intervals and every completion.

    unisd eval scienceqa cos_e --model runs/mine
    unisd eval mbpp --model Qwen/Qwen2.5-0.5B-Instruct --limit 100
    unisd eval toolalpaca --data eval_simulated.json --model runs/mine
    unisd eval arc_challenge --model runs/mine --via lm-eval

The last is the same rows by EleutherAI's lm-evaluation-harness. Decoding is greedy for certain: whatever else the
model's generation config asks for is put aside. A run that was killed goes on where it was. For each benchmark the
folder gets NAME.json (scores) and NAME.jsonl (completions).
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from unisd.benchmarks import Benchmark, benchmarks
from unisd.cli import evaluate_lm_eval as by_harness
from unisd.cli.device import choose_device
from unisd.cli.dtype import DTYPES, choose_dtype
from unisd.cli.errors import CommandError, setting_up
from unisd.cli.parser import CommandParser, add_generator, natural, positive
from unisd.evaluation.benchmark import BenchmarkScores, evaluate_benchmark
from unisd.evaluation.files import write_result
from unisd.evaluation.lm_eval import HarnessScores
from unisd.generation import make_generator
from unisd.models import FETCHED, SMOLLM2, load_model, resolve_model
from unisd.peak_memory import peak_memory_gib
from unisd.sandbox import Sandbox


def main(arguments: list[str]) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    known = benchmarks()
    if options.data is not None and len(options.names) > 1:
        raise CommandError(f"--data is the file of one benchmark, and {len(options.names)} are asked for")
    in_process = options.generator == "transformers"
    if not in_process:
        _refuse_of_this_process(options)
    # Deprecations between the libraries underneath; nothing a reader of the scores could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    with setting_up():
        given = None
        if options.via:
            by_harness.check(options, parser.parse_args(options.names))
            given = by_harness.given_rows(options)
        device = choose_device(options.device)
        loaded = None
        if in_process:
            dtype = choose_dtype(options.dtype, device)
            trust = options.trust_remote_code
            loaded = load_model(
                options.model, options.adapter, dtype, device=device, trust_remote_code=trust,
                attn_implementation=options.attn_implementation,
            )  # fmt: skip
            chats = getattr(loaded[1], "chat_template", None) is not None
            print(f"{options.model} on {device}, {str(dtype).removeprefix('torch.')}", flush=True)
        else:
            chats = options.generator.startswith("http") or _has_chat_template(options.model)
    if options.via:
        assert loaded is not None, "another --generator is refused with --via"
        for scores, beside, seconds in by_harness.results(options, loaded, given, device):
            _say(scores, _write(scores, known[scores.benchmark.name], options, beside, seconds, device))
        return 0
    with setting_up():
        generator = make_generator(
            options.generator,
            options.model,
            batch_size=options.batch_size,
            device=device,
            loaded=loaded,
            trust_remote_code=options.trust_remote_code,
            options=_generator_options(options),
        )
        rows = {}
        for name in dict.fromkeys(options.names):
            split = options.split or known[name].default_split
            rows[name] = known[name].rows(split, options.data)[: options.limit]
        if any(known[name].kind == "code" for name in rows):
            Sandbox(options.unsafe_code)  # refuses now what would be refused when all replies have been written
    longest = options.max_new_tokens or 1024
    for name, of_one in rows.items():
        started = time.perf_counter()
        scores = evaluate_benchmark(
            known[name],
            of_one,
            generator,
            chats=chats,
            max_new_tokens=longest,
            seed=options.seed,
            unsafe_code=options.unsafe_code,
            scored_by=loaded if options.likelihood and known[name].kind == "choice" else None,
            progress=sys.stderr.isatty() or options.progress,
        )
        beside = {
            "split": options.split or known[name].default_split,
            "seed": options.seed,
            "decoding": f"greedy, at most {longest} tokens, by {options.generator}",
        }
        _say(scores, _write(scores, known[name], options, beside, time.perf_counter() - started, device))
    return 0


def _refuse_of_this_process(options: argparse.Namespace) -> None:
    """Raise CommandError for what another generator would leave out without a word."""
    given = {
        "likelihood": options.likelihood,
        "adapter": options.adapter is not None,
        "attn_implementation": options.attn_implementation is not None,
        "dtype": options.dtype != "auto" and options.generator != "vllm",
    }
    for name in [name for name, is_given in given.items() if is_given]:
        raise CommandError(f"--{name} needs the model in this process, not --generator {options.generator}")


def _generator_options(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, with the dtype."""
    dtype = {} if options.dtype == "auto" or options.generator != "vllm" else {"dtype": options.dtype}
    return {**dtype, **(options.generator_options or {})}


def _say(scores: BenchmarkScores | HarnessScores, file: Path) -> None:
    print(scores.table(), flush=True)
    print(f"  {file}, {file.with_suffix('.jsonl').name}")


def _has_chat_template(model: str) -> bool:
    from unisd.text_tokenizer import load_tokenizer  # which takes seconds to import

    return getattr(load_tokenizer(resolve_model(model)), "chat_template", None) is not None


def _write(
    scores: BenchmarkScores | HarnessScores,
    benchmark: Benchmark,
    options: argparse.Namespace,
    beside: dict[str, Any],
    seconds: float,
    device: torch.device,
) -> Path:
    before = {
        "model": str(options.model),
        "adapter": options.adapter,
        "file": None if options.data is None else Path(options.data).name,
        "limit": options.limit,
        **beside,
    }
    after = {
        "source": benchmark.source,
        "licence": benchmark.licence,
        "seconds": round(seconds, 1),
        "peak_memory_gib": round(peak_memory_gib(device), 3),
    }
    file: Path = options.output / f"{benchmark.name}{'_lm_eval' if options.via else ''}.json"
    write_result(file, scores, before, after)
    return file


def _parser() -> CommandParser:
    parser = CommandParser(prog="unisd eval", description=__doc__)
    names = list(benchmarks())
    parser.add_argument("names", nargs="+", choices=names, metavar="BENCHMARK", help=", ".join(names))
    parser.add_argument(
        "--model",
        default=SMOLLM2,
        help=f"model id, {', '.join(FETCHED)}, local folder, run, or folder of a PEFT adapter",
    )
    parser.add_argument("--adapter", help="folder of a PEFT adapter to put on --model")
    parser.add_argument("--data", help="a local file in the benchmark's original format, in place of the hub")
    parser.add_argument(
        "--split", choices=["train", "validation", "test"], help="default: test, else the last there is"
    )
    parser.add_argument("--limit", type=positive, help="the first rows only")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/eval"), help="folder for scores, completions")
    parser.add_argument("--max_new_tokens", type=positive, help="longest reply (default: 1024)")
    parser.add_argument("--seed", type=natural, default=42, help="of the order of the choices")
    parser.add_argument("--likelihood", action="store_true", help="multiple choice: also by the options' probability")
    add_generator(parser)
    parser.add_argument("--batch_size", type=positive, help="prompts generated together")
    parser.add_argument("--device", default="auto", help="auto (CUDA if it is there, else the CPU), cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="of the weights")
    parser.add_argument("--attn_implementation", help="sdpa, eager, flash_attention_2, ...")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--unsafe_code", action="store_true", help="run a model's code without bubblewrap")
    parser.add_argument(
        "--via", choices=["lm-eval"], help="by lm-evaluation-harness (pip install 'unisd-kernels[lm-eval]')"
    )
    parser.add_argument("--progress", action="store_true", help="bars although standard error is no terminal")
    return parser
