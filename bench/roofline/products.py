"""`python -m bench products --device cuda --output FILE`: rates of the library's products at the rows that chunks have.

How many rows of logits are worth holding is decided by these: of logits [rows, V] in float32 and in the operands' 16
bits, and of a gradient [rows, V] back to [rows, H], also from rows that lie two apart, and two blocks of rows in one
batched product.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bench.cases import HEADS
from bench.measuring.timing import interleaved_seconds
from bench.parser import cuda_device, gpu_command_parser
from bench.records import results_file
from bench.records.environment import environment
from bench.roofline.tuning_shapes import MAIN_HEADS

ROWS = (256, 384, 512, 768, 1024, 2048)


def steps(
    width: int, columns: int, rows: Sequence[int], device: torch.device
) -> Mapping[tuple[str, int], Callable[[], object]]:
    """(what, rows) -> a product of `2 rows width columns` FLOPs."""
    most = max(rows)
    hidden = torch.randn(most, width, device=device).bfloat16()
    weight = (torch.randn(columns, width, device=device) / width**0.5).bfloat16()
    # Rows padded to whole vectors, as the package's own buffers are.
    stride = -(-columns // 64) * 64 + 64
    wide = torch.empty(most, stride, device=device)
    wide.normal_()
    narrow = wide.bfloat16()
    result = torch.empty(most, width, device=device)
    found: dict[tuple[str, int], Callable[[], object]] = {}

    def add(what: str, count: int, step: Callable[[], object]) -> None:
        found[what, count] = step

    for count in rows:
        h, logits, out = hidden[:count], wide[:count, :columns], result[:count]
        short = narrow[:count, :columns]
        apart = wide.view(torch.bfloat16)[:count, :columns]
        add("logits float32", count, lambda h=h, o=logits: torch.mm(h, weight.T, out_dtype=torch.float32, out=o))
        add("logits 16 bits", count, lambda h=h, o=short: torch.mm(h, weight.T, out=o))
        add("gradient", count, lambda g=short, o=out: torch.mm(g, weight, out_dtype=torch.float32, out=o))
        # Of rows twice as far apart, as where a gradient takes the place of float32 logits.
        add("gradient, apart", count, lambda g=apart, o=out: torch.mm(g, weight, out_dtype=torch.float32, out=o))
        if count % 2 == 0:
            pair, result_pair = short.unflatten(0, (2, -1)), out.unflatten(0, (2, -1))
            both = weight.expand(2, -1, -1)
            add(
                "gradient, two blocks",
                count,
                lambda g=pair, o=result_pair, b=both: torch.bmm(g, b, out_dtype=torch.float32, out=o),
            )
    return found


def measure(head: str, rows: Sequence[int], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """A row for each product: milliseconds (median, samples) and TFLOP/s."""
    width, columns = HEADS[head]
    failed: dict[str, str] = {}
    made = {f"{what}|{count}": step for (what, count), step in steps(width, columns, rows, device).items()}
    samples = interleaved_seconds(
        made, rounds, device, on_failure=lambda name, error: failed.update({name: str(error).splitlines()[0]})
    )
    found = []
    for name in made:
        what, count = name.split("|")
        row: dict[str, Any] = {"head": head, "width": width, "columns": columns, "product": what, "rows": int(count)}
        if name in failed:
            row["failure"] = failed[name]
        else:
            seconds = statistics.median(samples[name])
            row |= {"milliseconds": seconds * 1e3, "samples": samples[name]}
            row["tflop_per_s"] = 2 * int(count) * width * columns / seconds / 1e12
        found.append(row)
    return found


def table(result: Mapping[str, Any]) -> str:
    """TFLOP/s, a line for each head and product."""
    rows = list(dict.fromkeys(row["rows"] for row in result["rows"]))
    lines = [f"TFLOP/s of the library's products on {result['environment']['device']}, bfloat16.", ""]
    lines += ["| head | product | " + " | ".join(map(str, rows)) + " rows |", "|---|---|" + "---|" * len(rows)]
    by_place = {(row["head"], row["product"], row["rows"]): row for row in result["rows"]}
    for head, product in dict.fromkeys((row["head"], row["product"]) for row in result["rows"]):
        cells = []
        for count in rows:
            row = by_place.get((head, product, count), {})
            cells.append(f"{row['tflop_per_s']:.0f}" if "tflop_per_s" in row else row.get("failure", "-"))
        lines.append(f"| {head} | {product} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = gpu_command_parser("products", __doc__)
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=list(MAIN_HEADS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    if options.report:
        print(table(results_file.read(options.report)))
        return 0
    device = cuda_device(parser, options.device, "products")
    result: dict[str, Any] = {"environment": environment(device), "rows": []}
    for head in options.heads:
        result["rows"] += measure(head, options.rows, device, options.rounds)
        torch.cuda.empty_cache()
        if options.output:
            results_file.write_json(options.output, result)
    print(table(result))
    return int(any("failure" in row for row in result["rows"]))
