"""`python -m bench scorers NAME=FILE ...`: what the scorers give gold answers, and other questions' answers.

    python -m bench scorers scienceqa=train.jsonl mbpp=mbpp.jsonl humaneval=HumanEval.jsonl.gz

Files are in the benchmarks' original formats. Gold answers have to score 1; of multiple choice, another question's
letter scores by chance (1 / number of choices, and 0 for a letter that this question does not have).
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.parser import command_parser
from bench.records import results_file
from bench.records.environment import environment
from unisd.benchmarks import benchmarks
from unisd.cli.errors import CommandError
from unisd.scoring import MEASURES, mean_interval, score_replies
from unisd.tasks import Example, read_rows
from unisd.tasks.multiple_choice import LETTERS


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("scorers", __doc__)
    parser.add_argument("files", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--unsafe_code", action="store_true", help="run code without bubblewrap")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(list(arguments))
    known = benchmarks()
    runs = []
    print(f"{'benchmark':<14} {'rows':>5} {'unread':>6} {'measure':<8} {'gold':>6} {'shuffled':>8} {'chance':>6}")
    for given in options.files:
        name, _, file = given.partition("=")
        if name not in known or not file:
            raise CommandError(f"give NAME=FILE with a NAME of {', '.join(known)}, got {given!r}")
        started = time.perf_counter()
        run = {"file": Path(file).name, **scored(known[name].rows("test", file), known[name].kind, options.unsafe_code)}
        run["seconds"] = round(time.perf_counter() - started, 1)
        runs.append({"benchmark": name, **run})
        chance = f"{run['chance']:>6.3f}" if run["chance"] is not None else f"{'-':>6}"
        measure = MEASURES[known[name].kind][0]
        counts = f"{name:<14} {run['rows']:>5} {sum(run['unread'].values()):>6} {measure:<8}"
        print(f"{counts} {run['gold'][measure]:>6.3f} {run['shuffled']['value']:>8.3f} {chance}", flush=True)
    if options.output:
        results_file.write_json(options.output, {"environment": environment(torch.device("cpu")), "runs": runs})
    return 0


def scored(rows: Sequence[dict[str, Any]], kind: str, unsafe_code: bool) -> dict[str, Any]:
    """Means of every measure for gold answers, and of the first one for those of other questions."""
    reading = read_rows(rows, kind=kind)
    examples = reading.examples
    gold = score_replies(kind, examples, [_reply(each) for each in examples], unsafe_code=unsafe_code)
    order = list(range(len(examples)))
    random.Random(0).shuffle(order)
    others = [_reply(examples[place]) for place in order]
    measure = MEASURES[kind][0]
    shuffled = [each.values[measure] for each in score_replies(kind, examples, others, unsafe_code=unsafe_code)]
    return {
        "rows": len(examples),
        "unread": dict(reading.rejected),
        "gold": {name: sum(each.values[name] for each in gold) / len(gold) for name in gold[0].values},
        "shuffled": mean_interval(shuffled).as_dict(),
        "chance": _chance(examples) if kind == "choice" else None,
    }


def _reply(example: Example) -> str:
    return f"```python\n{example.demonstration}\n```" if example.tests else example.demonstration


def _chance(examples: Sequence[Example]) -> float:
    """Mean probability that another question's letter is the right one, by the letters' shares among the gold ones."""
    letters = [example.answer for example in examples]
    share = {letter: letters.count(letter) / len(letters) for letter in LETTERS}
    return sum(share[letter] for letter in letters) / len(letters)
