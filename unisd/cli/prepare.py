"""`unisd prepare`: from a file of questions and answers to rows with every view that UniSD reads.

    unisd prepare questions.jsonl -o prepared
    unisd prepare questions.csv --prompt_column ask --answer_column reply \\
        --contexts retrieval -o prepared
    unisd prepare mbpp.jsonl --limit 100 --context_pool 8 -o prepared

The rows may be JSON lines, JSON, CSV, Parquet, a folder that `datasets` saved, or an id of the hub; their kind (open
questions, multiple choice, code with tests, tool use) is told from their columns. What each model will read:
`unisd show FOLDER --row 0`.

Wrong demonstrations are written by the model itself and validated; replies are kept in the user's cache, so that a run
that was killed goes on where it was. No answer is ever printed.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from unisd.benchmarks import is_benchmark, rows_to_train_on
from unisd.cli.device import choose_device
from unisd.cli.errors import CommandError, setting_up
from unisd.cli.output_folder import make_writable
from unisd.cli.parser import CommandParser, add_generator, natural, positive
from unisd.contexts import LengthLimit
from unisd.contexts.template import TeacherTemplate
from unisd.generation import make_generator
from unisd.models import FETCHED, SMOLLM2, base_of, is_adapter, resolve_model
from unisd.prepare.folder import is_prepared, save_prepared
from unisd.prepare.pipeline import prepare
from unisd.prepare.settings import CONTEXTS, NEGATIVES, PrepareSettings
from unisd.prepare.sources import load_rows
from unisd.tasks import KINDS, Columns
from unisd.text_tokenizer import load_tokenizer


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    folder: Path = options.output
    if folder.exists() and not options.overwrite:
        raise CommandError(f"{folder} exists: give --overwrite to replace it, or another -o FOLDER")
    if folder.exists() and not is_prepared(folder):
        raise CommandError(f"{folder} was not written by unisd prepare and is not replaced; give another -o FOLDER")
    make_writable(folder.parent, "-o FOLDER")
    with setting_up():
        settings = settings_of(options)
        if is_benchmark(options.data):
            raw = rows_to_train_on(options.data, options.split)
        else:
            raw = load_rows(options.data, split=options.split, config=options.dataset_config)
        if options.limit:
            raw = raw[: options.limit]
        tokenizer = load_tokenizer(resolve_model(options.model), trust_remote_code=options.trust_remote_code)
        prepared = prepare(
            raw,
            settings,
            generator=lambda: make_generator(
                options.generator,
                _served_name(options),
                batch_size=options.batch_size,
                device=choose_device(options.device),
                trust_remote_code=options.trust_remote_code,
                options=options.generator_options,
            ),
            chats=options.generator != "transformers" or getattr(tokenizer, "chat_template", None) is not None,
            tokenizer=tokenizer,
            limit=LengthLimit(options.max_prompt_length, _positions(options)),
        )
        given = {name: value for name, value in vars(options).items() if name not in ("output", "overwrite")}
        save_prepared(prepared, folder, given)
    print("\n".join(prepared.report.lines()))
    print(f"saved to {folder}")
    print(f"look at it:  unisd show {folder} --row 0")
    print(f"train on it: unisd train --dataset {folder} --model_name_or_path {options.model} --output_dir runs/mine")
    return 0


def settings_of(options: Any) -> PrepareSettings:
    """The settings that the options mean.

    Raises:
        ValueError: see `PrepareSettings`.
    """
    return PrepareSettings(
        contexts=options.contexts,
        negatives=options.negatives,
        num_auxiliary=options.num_auxiliary,
        demos_per_context=options.demos_per_context,
        context_pool=options.context_pool,
        columns=Columns.of(options),
        kind=options.task,
        shuffle_choices=options.shuffle_choices,
        template=TeacherTemplate.of(options),
        seed=options.seed,
        retries=options.retries,
        unsafe_code=options.unsafe_code,
        encoder=options.encoder,
    )


def _parser() -> CommandParser:
    parser = CommandParser(prog="unisd prepare", description=__doc__)
    parser.add_argument("data", help="file, folder, benchmark by name, or hub id")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the prepared rows")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder")
    parser.add_argument("--split", default="train", help="of a hub id or a folder with splits")
    parser.add_argument("--dataset_config", help="configuration name of a hub id")
    parser.add_argument("--limit", type=positive, help="take the first rows only")

    rows = parser.add_argument_group("rows (columns and kind are found where they are not named)")
    for role in ("prompt", "answer", "choices", "tests", "explanation"):
        rows.add_argument(f"--{role}_column", metavar="NAME")
    rows.add_argument("--task", choices=KINDS, help="kind of task")
    rows.add_argument("--keep_order", dest="shuffle_choices", action="store_false", help="do not shuffle the choices")

    made = parser.add_argument_group("views")
    made.add_argument("--contexts", choices=CONTEXTS, default="random", help="of the auxiliary prompts")
    made.add_argument("--num_auxiliary", type=natural, default=3, metavar="K", help="auxiliary prompts of a row")
    made.add_argument("--demos_per_context", type=positive, default=1, metavar="N", help="solved examples in each")
    made.add_argument(
        "--context_pool",
        type=natural,
        default=0,
        metavar="M",
        help="take them from M fixed sets, whose keys and values training computes once; 0: each row its own",
    )
    made.add_argument("--encoder", default="all-MiniLM-L6-v2", help="name or folder, for --contexts retrieval")
    made.add_argument("--negatives", choices=NEGATIVES, default="model", help="wrong demonstrations")
    made.add_argument("--retries", type=natural, default=2, help="further tries where a reply is rejected")
    made.add_argument("--teacher_template", help="with {prompt}, {demonstration} and {study}")
    made.add_argument("--study_sentence", help="what stands for {study}; default: the task's own")
    made.add_argument("--seed", type=natural, default=42)

    model = parser.add_argument_group("model (writes negatives and instructions; its tokenizer measures lengths)")
    model.add_argument(
        "--model", default=SMOLLM2, help=f"model id, {', '.join(FETCHED)}, local folder, or folder of a PEFT adapter"
    )
    add_generator(model)
    model.add_argument("--served_model", help="the model's name at the server (default: the only one there)")
    model.add_argument("--device", default="auto", help="of the model, for --generator transformers")
    model.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    model.add_argument("--batch_size", type=positive, help="prompts generated together")
    model.add_argument("--unsafe_code", action="store_true", help="run a model's code without bubblewrap")
    model.add_argument(
        "--max_prompt_length",
        type=positive,
        help="rows with a view of more tokens are dropped (default: the model's positions)",
    )
    return parser


def _positions(options: argparse.Namespace) -> int | None:
    """Positions of the model, the most tokens that a view can have."""
    base = base_of(options.model) if is_adapter(options.model) else options.model
    config = AutoConfig.from_pretrained(resolve_model(base), trust_remote_code=options.trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _served_name(options: argparse.Namespace) -> str:
    return (options.served_model or "") if options.generator.startswith("http") else options.model
