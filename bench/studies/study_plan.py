"""What the study runs: parts, methods, seeds and sizes, and the words of each command."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bench.studies.study_methods import ALONE, BASE, DIAGNOSED, MIXED, PLAIN, SEEDED, STEADY
from unisd.models import SMOLLM2
from unisd.sweep import Cell

_SELDOM = 1000
"""Steps between measurements of the drift: only before and after."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the study; the defaults are those of the page.

    Attributes:
        steps, batch_size: optimizer steps and completions in each; so many different rows are trained on, once.
        learning_rate: of every method; warmed up over a tenth of the steps, then cosine decay, as in `unisd demo`.
        completion, diagnostic_completion: most tokens of a rollout.
        items: held-out items of each evaluation.
        reply: most tokens of a reply to CoS-E.
        chat: most tokens of a completion of `unisd eval drift`.
        seeds: their number.
        task_steps, diagnostic_steps: of the procedural tasks; of the diagnostic's training tasks.
        asked_steps, asked: of the diagnostic's held-out tasks, and how many there are in all.
        budget, budget_rate, budget_steps: nats a token; a learning rate, held constant without warm-up, that
            collapses; optimizer steps.
        dtype: of the base's weights; float32 where the processor has no products of 16 bits.
    """

    steps: int = 12
    batch_size: int = 4
    learning_rate: float = 1e-3
    completion: int = 40
    diagnostic_completion: int = 80
    items: int = 80
    reply: int = 48
    chat: int = 32
    seeds: int = 3
    task_steps: tuple[int, ...] = (1, 2)
    diagnostic_steps: tuple[int, ...] = (1, 2, 3)
    asked_steps: tuple[int, ...] = (1, 2, 3, 5)
    asked: int = 80
    budget: float = 0.02
    budget_rate: float = 5e-3
    budget_steps: int = 16
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Planned:
    """A run and its evaluations, or (without a cell) the evaluations of the base.

    Attributes:
        part, variant: its folder, e.g. "budget" and "kept".
        name: of the run.
        cell: what is trained, or None.
        train: further words for `unisd train`.
        evaluations: words for `unisd eval`.
    """

    part: str
    name: str
    cell: Cell | None
    evaluations: tuple[tuple[str, ...], ...]
    train: tuple[str, ...] = ()
    variant: str = field(default="")

    def folder(self, root: Path) -> Path:
        """The folder of its sweep; the run's is in it."""
        return root / self.part / self.variant if self.variant else root / self.part


def planned(part: str, sizes: Sizes, cos_e: Path, cos_e_test: Path) -> list[Planned]:
    """The runs of a part; of those with several seeds the first ones come before the second ones."""
    if part == "study":
        return _study(sizes, cos_e, cos_e_test)
    if part == "why":
        return _why(sizes)
    if part == "mixtures":
        return _mixtures(sizes, cos_e, cos_e_test)
    return _diagnostic(sizes) if part == "diagnostic" else _budget(sizes)


def _asked_of_cos_e(sizes: Sizes, cos_e_test: Path) -> tuple[str, ...]:
    return (
        *("cos_e", *_dtype(sizes), "--data", str(cos_e_test), "--limit", str(sizes.items)),
        *("--batch_size", "16", "--max_new_tokens", str(sizes.reply)),
    )


def _study(sizes: Sizes, cos_e: Path, cos_e_test: Path) -> list[Planned]:
    asked = {"procedural": _asked(sizes), "cos_e": _asked_of_cos_e(sizes, cos_e_test)}
    also = (("behaviour", *_dtype(sizes)), ("drift", *_dtype(sizes), "--max_new_tokens", str(sizes.chat)))
    sources = {"procedural": "procedural", "cos_e": str(cos_e)}
    words = {
        "procedural": _train(sizes, sizes.steps, sizes.completion, sizes.task_steps),
        "cos_e": _train(sizes, sizes.steps, sizes.completion),
    }
    runs = [Planned("study", BASE, None, (*asked.values(), also[0]))]
    for seed in range(sizes.seeds):
        for preset in (*SEEDED, *(ALONE if seed == 0 else ())):
            for name, source in sources.items():
                cell = Cell(source, preset, seed)
                broad = also if preset in SEEDED and seed == 0 else ()
                runs.append(Planned("study", cell.name, cell, (asked[name], *broad), words[name]))
    return runs


def _why(sizes: Sizes) -> list[Planned]:
    """UniSD* with the divergence of SDFT: what of their difference is its direction."""
    cell = Cell("procedural", "unisd_star", 0)
    train = (*_train(sizes, sizes.steps, sizes.completion, sizes.task_steps), "--beta", "1.0")
    return [Planned("why", cell.name, cell, (_asked(sizes),), train, "reverse_kl")]


def _mixtures(sizes: Sizes, cos_e: Path, cos_e_test: Path) -> list[Planned]:
    """SDFT with each mixture of teachers, seed by seed, then each alone as the study runs a mechanism; beside them the
    same without a mixture, as in the study, since another processor rounds otherwise and trains another model."""
    asked, train = _asked(sizes), _train(sizes, sizes.steps, sizes.completion, sizes.task_steps)
    runs = []
    for seed in range(sizes.seeds):
        cell = Cell("procedural", STEADY, seed)
        runs.append(Planned("mixtures", cell.name, cell, (asked,), train))
        for mixture in MIXED.values():
            words = (*train, "--teacher_mixture", mixture)
            runs.append(Planned("mixtures", cell.name, cell, (asked,), words, f"{STEADY}_{mixture}"))
    alone = (
        ("procedural", train, asked),
        (str(cos_e), _train(sizes, sizes.steps, sizes.completion), _asked_of_cos_e(sizes, cos_e_test)),
    )
    for source, words, evaluation in alone:
        cells = [Cell(source, preset, 0) for preset in (PLAIN, *MIXED)]
        runs += [Planned("mixtures", cell.name, cell, (evaluation,), words) for cell in cells]
    return runs


def _diagnostic(sizes: Sizes) -> list[Planned]:
    asked = ("diagnostic", *_dtype(sizes), "--count", str(sizes.asked), "--steps", *map(str, sizes.asked_steps))
    asked = (*asked, "--operations", "+", "-")
    train = _train(sizes, sizes.steps, sizes.diagnostic_completion, sizes.diagnostic_steps)
    cells = [Cell("diagnostic", preset, 0) for preset in DIAGNOSED]
    base = Planned("diagnostic", BASE, None, (asked,))
    return [base, *(Planned("diagnostic", cell.name, cell, (asked,), train) for cell in cells)]


def _budget(sizes: Sizes) -> list[Planned]:
    asked = _asked(sizes)
    train = (
        *_train(sizes, sizes.budget_steps, sizes.completion, sizes.task_steps, sizes.budget_rate, probe_every=4),
        *("--lr_scheduler_type", "constant", "--warmup_steps", "0"),
    )
    kept = (*train, "--drift_budget", str(sizes.budget))
    cells = [Cell("procedural", "sdft", seed) for seed in range(sizes.seeds)]
    free = Planned("budget", cells[0].name, cells[0], (asked,), train, "free")
    return [free, *(Planned("budget", cell.name, cell, (asked,), kept, "kept") for cell in cells)]


def _dtype(sizes: Sizes) -> tuple[str, ...]:
    return ("--dtype", sizes.dtype)


def _asked(sizes: Sizes) -> tuple[str, ...]:
    return ("procedural", *_dtype(sizes), "--count", str(sizes.items), "--steps", *map(str, sizes.task_steps))


def _train(
    sizes: Sizes,
    steps: int,
    completion: int,
    task_steps: tuple[int, ...] = (),
    learning_rate: float | None = None,
    probe_every: int = _SELDOM,
) -> tuple[str, ...]:
    generated = ("--procedural_rows", str(steps * sizes.batch_size), "--procedural_steps", *map(str, task_steps))
    return (
        *("--model_name_or_path", SMOLLM2, *_dtype(sizes), "--bf16", "false"),
        *("--use_peft", "true", "--lora_r", "16", "--lora_alpha", "32", "--lora_target_modules", "all-linear"),
        *("--max_steps", str(steps), "--per_device_train_batch_size", str(sizes.batch_size)),
        *("--gradient_accumulation_steps", "1", "--num_auxiliary", "2", "--max_completion_length", str(completion)),
        *("--learning_rate", str(learning_rate or sizes.learning_rate), "--drift_probe_every", str(probe_every)),
        *("--logging_steps", "1", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true"),
        *("--gradient_checkpointing", "false", *(generated if task_steps else ())),
    )
