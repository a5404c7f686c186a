"""The schema of results, as JSON or as CSV.

JSON: `{"environment": {...}, "rows": [...], ...}`. CSV: a line for each row, its samples joined by blanks, followed by
the environment in the same columns on every line.

A row is one peer at one case and divergence. Fields: `COLUMNS`. Seconds are of one step; ratios are to the floor
within a round, of which median and the 0.2 and 0.8 quantiles; `share_of_peak` is the time of as many multiply-adds on
registers alone over the peer's, within a round; errors are relative, by Frobenius norms, against float64;
bytes are what one step adds at its peak. `failure` stands in place of the figures.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from bench.cases import Case
from unisd.cli.errors import CommandError
from unisd_kernels import files
from unisd_kernels.files import replacing

CASE_COLUMNS = (
    "case",
    "operation",
    "num_rows",
    "hidden_size",
    "vocab_size",
    "num_auxiliary",
    "dtype",
    "frozen_head",
    "data",
    "num_products",
)
COLUMNS = (
    *CASE_COLUMNS,
    "divergence",
    "peer",
    "device_type",
    "ratio_to_floor",
    "ratio_p20",
    "ratio_p80",
    "bar",
    "share_of_peak",
    "peak_bar",
    "median_seconds",
    "p20_seconds",
    "p80_seconds",
    "extra_peak_bytes",
    "joules",
    "value_error",
    "value_error_limit",
    "gradient_error",
    "gradient_error_limit",
    "failure",
    "note",
    "samples_seconds",
)
ENVIRONMENT_COLUMNS = (
    "device",
    "driver",
    "gpu",
    "cpu",
    "processor",
    "products",
    "threads",
    "instruction_set",
    "python",
    "cuda",
    "versions",
    "commit",
    "date",
    "command",
)


def case_fields(case: Case) -> dict[str, Any]:
    return {
        "case": case.name,
        "operation": case.operation,
        "num_rows": case.num_rows,
        "hidden_size": case.hidden_size,
        "vocab_size": case.vocab_size,
        "num_auxiliary": case.num_auxiliary,
        "dtype": str(case.dtype).removeprefix("torch."),
        "frozen_head": case.frozen_head,
        "data": case.data,
        "num_products": case.num_products,
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Rows and environment, as the suffix says: .json or .csv; whole or not at all.

    Raises:
        ValueError: another suffix.
    """
    check_suffix(path)
    with replacing(path) as partial:
        if path.suffix == ".csv":
            _write_csv(partial, result)
        else:
            partial.write_text(json.dumps(result, indent=1) + "\n")


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Results of any other schema; whole or not at all."""
    files.write_json(path, result)


def read(path: Path) -> dict[str, Any]:
    """A result file of any schema.

    Raises:
        CommandError: it is not there, or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CommandError(f"{path} is not a result file: {error}") from None


def check_suffix(path: Path) -> None:
    """Raise ValueError unless `write` can write such a file."""
    if path.suffix not in (".json", ".csv"):
        raise ValueError(f"results are written as .json or .csv, got {path.name!r}")


def _write_csv(path: Path, result: dict[str, Any]) -> None:
    environment = dict(result["environment"])
    for name in ("versions", "processor", "products"):
        environment[name] = " ".join(f"{key}={value}" for key, value in (environment.get(name) or {}).items())
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow([*COLUMNS, *ENVIRONMENT_COLUMNS])
        for row in result["rows"]:
            cells = {**row, "samples_seconds": " ".join(repr(sample) for sample in row.get("samples_seconds", ()))}
            lines.writerow(
                [cells.get(name) for name in COLUMNS] + [environment.get(name) for name in ENVIRONMENT_COLUMNS]
            )
