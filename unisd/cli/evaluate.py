"""`unisd eval`: how well a model does procedural tasks, and what training changed elsewhere.

unisd eval procedural --model runs/demo/adapter --steps 1 2 3 --count 30
unisd eval retention --model runs/demo/adapter
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from unisd.data.procedural import SPLITS, procedural_rows
from unisd.evaluation import evaluate_procedural, evaluate_retention
from unisd.models import SMOLLM2, load_model


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="unisd eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["procedural", "retention"])
    parser.add_argument("--model", default=SMOLLM2, help="model id, local folder, or folder of a PEFT adapter")
    parser.add_argument("--adapter", help="folder of a PEFT adapter to put on --model")
    parser.add_argument("--base", help="retention: model to compare with (default: the model without its adapter)")
    parser.add_argument("--count", type=int, default=30, help="procedural: number of tasks")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 3], help="procedural: numbers of steps, in turn")
    parser.add_argument("--look-back", type=int, default=1, help="procedural: how far back operands may lie")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-accuracy", action="store_true", help="procedural: perplexity only (no generation)")
    parser.add_argument("--output", type=Path, help="JSON file for the scores")
    options = parser.parse_args(arguments)

    model, tokenizer = load_model(options.model, adapter=options.adapter)
    scores: Any
    if options.what == "procedural":
        rows = procedural_rows(
            options.count,
            seed=options.seed,
            split=options.split,
            num_steps=options.steps,
            look_back=options.look_back,
            num_auxiliary=0,
        )
        scores = evaluate_procedural(model, tokenizer, rows, accuracy=not options.no_accuracy)
    else:
        base = None if options.base is None else load_model(options.base)[0]
        scores = evaluate_retention(model, tokenizer, base_model=base)
    print(scores.table())
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(scores.as_dict(), indent=1) + "\n")
    return 0
