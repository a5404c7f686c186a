"""`unisd demo`: self-distillation of a real language model, on this machine, in minutes.

SmolLM2-135M-Instruct cannot carry out a short arithmetic procedure when it is only asked. The same model with a worked
solution in its context can. The demo trains LoRA adapters with the `unisd_star` preset, so that the model without the
solution gets closer to the model with it, and measures before and after on held-out tasks: perplexity of the correct
reply, accuracy of the model's own reply, and retention (how far chat that has nothing to do with the task moved).
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback

from unisd.cli.errors import setting_up
from unisd.cli.parser import CommandParser, natural, positive, positive_number
from unisd.compare import load_run, rendered
from unisd.data.procedural import procedural_dataset, procedural_rows
from unisd.evaluation import evaluate_procedural, evaluate_retention
from unisd.evaluation.environment import environment
from unisd.evaluation.files import write_result
from unisd.evaluation.folder import EVALUATIONS
from unisd.models import SMOLLM2, load_model
from unisd.presets import PRESETS
from unisd_kernels.files import replacing, write_json

STEPS_OF_TASKS = (1, 2)
BEFORE = "before"
"""Folder of the scores before training."""


def main(arguments: list[str]) -> int:
    parser = CommandParser(prog="unisd demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for report and adapter")
    parser.add_argument(
        "--preset", choices=list(PRESETS), metavar="PRESET", default="unisd_star", help="`unisd presets` lists them"
    )
    parser.add_argument("--optimizer-steps", type=positive, default=30)
    parser.add_argument("--batch-size", type=positive, default=4)
    parser.add_argument("--learning-rate", type=positive_number, default=1e-3)
    parser.add_argument("--eval-tasks", type=positive, default=24)
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the frozen weights; auto: bfloat16 on a GPU and where the processor has instructions for it",
    )
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument(
        "--minutes",
        type=positive_number,
        default=8.5,
        help="stop training after so long, counted from the start of the command",
    )
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    # Deprecations between the libraries underneath; nothing a reader of the demo could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    if options.dtype == "auto":
        options.dtype = "bfloat16" if multiplies_bfloat16() else "float32"
    print(f"SmolLM2-135M in {options.dtype}, its adapters in float32", flush=True)
    with setting_up():
        model, tokenizer = load_model(SMOLLM2, dtype=getattr(torch, options.dtype))
    held_out = procedural_rows(
        options.eval_tasks, seed=options.seed, split="test", num_steps=STEPS_OF_TASKS, num_auxiliary=0
    )
    print("before training:", flush=True)
    before = evaluate_procedural(model, tokenizer, held_out)
    print(before.table(), flush=True)
    shown = evaluate_procedural(
        model, tokenizer, held_out, prompt_column="teacher_prompt", accuracy=False
    ).overall.perplexity
    print(f"with the solution in its context the same model has perplexity {shown:.3f}: that is the teacher\n")

    trainer = make_trainer(model, tokenizer, options)
    trainer.add_callback(_Deadline(started + 60 * options.minutes))
    trainer.train()
    adapter = options.output / "adapter"
    trainer.save_model(str(adapter))
    tokenizer.save_pretrained(adapter)

    trained = trainer.accelerator.unwrap_model(trainer.model)
    after = evaluate_procedural(trained, tokenizer, held_out)
    retention = evaluate_retention(trained, tokenizer)
    minutes = (time.perf_counter() - started) / 60
    print("\nafter training:")
    print(after.table())
    print("\nretention, on held-out chat:")
    print(retention.table())
    trainer.save_state()  # the log
    for folder, scores in ((BEFORE, before), (EVALUATIONS, after)):
        write_result(options.output / folder / "procedural.json", scores, {"model": SMOLLM2}, {})
    write_result(options.output / EVALUATIONS / "retention.json", retention, {"model": SMOLLM2}, {})
    notes = [
        f"Held-out tasks of {' and '.join(map(str, STEPS_OF_TASKS))} steps; none was trained on.",
        f"With the solution in its context the untrained model has perplexity {shown:.3f}: that is the teacher.",
    ]
    facts = {"steps trained": trainer.state.global_step, "minutes taken": round(minutes, 1)}
    report = write_report(options.output, notes, facts)
    summary = {
        "seed": options.seed,
        "optimizer_steps": trainer.state.global_step,
        "before": before.as_dict()["overall"],
        "after": after.as_dict()["overall"],
        "teacher_perplexity": shown,
        "retention": retention.as_dict(),
        "minutes": minutes,
        "environment": environment(),
    }
    write_json(options.output / "summary.json", summary)
    print(f"\n{_verdict(before.overall, after.overall)}; {minutes:.1f} minutes")
    print(f"report: {report}\nadapter: {adapter} (unisd eval procedural --model {adapter})")
    print(
        "\nthe same with your own questions and answers (JSON lines, CSV, Parquet; the columns are found):\n"
        f"  unisd train --dataset FILE --model_name_or_path {SMOLLM2} --output_dir runs/mine\n"
        "what each model would read of them:\n"
        "  unisd prepare FILE -o prepared && unisd show prepared --row 0"
    )
    return 0


def write_report(folder: Path, notes: Sequence[str], facts: Mapping[str, Any]) -> Path:
    """The comparison of the model before and after as `report.html` of the demo's folder."""
    runs = [load_run(folder / BEFORE, "before"), load_run(folder, "after")]
    command = shlex.join(["unisd", *sys.argv[1:]])
    title = "UniSD demo: SmolLM2-135M on procedural tasks"
    page, _ = rendered(runs, title, notes=notes, facts={"command": command, **facts}, brief=True)
    with replacing(folder / "report.html") as new:
        new.write_text(page, encoding="utf-8")
    return folder / "report.html"


def multiplies_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 faster than float32: a GPU, or a CPU with AVX512_BF16, AMX or the like.

    Elsewhere PyTorch converts such operands first, which takes longer than float32."""
    if torch.cuda.is_available():
        return True
    # PyTorch before 2.13 does not tell.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def make_trainer(model: Any, tokenizer: Any, options: argparse.Namespace) -> Any:
    """A LoRA `UniSDTrainer` sized for a CPU: short tasks, one micro-batch a step."""
    from peft import LoraConfig

    from unisd import UniSDConfig, UniSDTrainer

    config = UniSDConfig(
        output_dir=str(options.output),
        preset=options.preset,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=1,
        max_steps=options.optimizer_steps,
        # Far above the recipe's 2e-5, which is meant for some hundred steps of larger batches.
        learning_rate=options.learning_rate,
        max_completion_length=40,
        # Two auxiliary contexts instead of three: most of the time of a step on a CPU goes into them.
        num_auxiliary=2,
        drift_probe_every=10,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
    )
    dataset = procedural_dataset(
        options.optimizer_steps * options.batch_size,
        seed=options.seed,
        num_steps=STEPS_OF_TASKS,
        num_auxiliary=config.num_auxiliary,
    )
    trainer = UniSDTrainer(
        model=model,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Bar())
    return trainer


class _Deadline(TrainerCallback):
    """Callback that ends training, cleanly, after the optimizer step during which the time is up."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.perf_counter() > self._deadline and state.global_step < state.max_steps:
            print(f"\ntime is up: {state.global_step} of {state.max_steps} steps were trained", flush=True)
            control.should_training_stop = True


class _Bar(ProgressCallback):
    """The usual bar with three figures beside it; all metrics go into the report."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {"loss": logs["loss"], "KL": logs.get("unisd/divergence"), "tokens": logs.get("num_tokens")}
            self.training_bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items() if value is not None})


def _verdict(before: Any, after: Any) -> str:
    change = 100 * (after.perplexity / before.perplexity - 1)
    return (
        f"perplexity of the correct reply {before.perplexity:.3f} -> {after.perplexity:.3f} ({change:+.0f}%), "
        f"accuracy {100 * before.accuracy:.0f}% -> {100 * after.accuracy:.0f}%"
    )
