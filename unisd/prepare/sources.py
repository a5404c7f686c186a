"""Raw rows: from files, folders, `datasets` folders and the hub. `datasets` is imported where it reads."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
"""Endings of files that can be read, and the reader of `datasets` for each. JSON may be packed by gzip (.jsonl.gz)."""


def is_local(source: str) -> bool:
    """Whether the source is a file or a folder here, or looks like one."""
    path = Path(source).expanduser()
    return _ending(path) in FORMATS or path.exists()


def load_rows(source: str, *, split: str = "train", config: str | None = None) -> list[dict[str, Any]]:
    """All rows of a source.

    Args:
        source: a .jsonl, .json (a list, or lines; also .gz), .csv or .parquet file; a folder of such files, or one that
            `datasets` saved; or an id of the hub.
        split: of a hub id, or of a folder with splits.
        config: of a hub id.

    Raises:
        ValueError: no such file, another format, no rows, a split that is not there.
    """
    path = Path(source).expanduser()
    if path.is_file() or _ending(path) in FORMATS:
        rows = _of_file(path)
    elif path.is_dir():
        rows = _of_folder(path, split)
    else:
        from datasets import load_dataset

        rows = _listed(load_dataset(source, config, split=split))
    if not rows:
        raise ValueError(f"{source} has no rows")
    return rows


def _ending(path: Path) -> str:
    """The ending that tells the format: `.jsonl` of rows.jsonl.gz."""
    endings = [ending.lower() for ending in path.suffixes]
    packed = len(endings) > 1 and endings[-1] == ".gz" and FORMATS.get(endings[-2]) == "json"
    return endings[-2] if packed else path.suffix.lower()


def _of_file(path: Path) -> list[dict[str, Any]]:
    if _ending(path) not in FORMATS:
        raise ValueError(f"{path} is not one of {', '.join(FORMATS)}")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    if _ending(path) in (".json", ".jsonl"):
        # Not through `datasets`, which wants one type in a column: an answer may be a text here and messages there.
        return _of_json(path)
    if path.suffix.lower() == ".csv":
        return _of_csv(path)
    from datasets import load_dataset

    return _listed(load_dataset(FORMATS[path.suffix.lower()], data_files=str(path), split="train"))


def _of_csv(path: Path) -> list[dict[str, Any]]:
    # Not through `datasets`, which guesses types: the answers 007, None and NA would be 7 and two missing ones.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        rows = []
        for row in reader:
            if None in row:
                raise ValueError(
                    f"{path}, line {reader.line_num}: more values than the first line has columns "
                    f"({len(reader.fieldnames or ())}); put texts with commas into double quotes"
                )
            rows.append(dict(row))
    return rows


def _of_json(path: Path) -> list[dict[str, Any]]:
    packed = path.suffix.lower() == ".gz"
    text = gzip.decompress(path.read_bytes()).decode("utf-8-sig") if packed else path.read_text(encoding="utf-8-sig")
    if _ending(path) == ".json":
        try:
            value = json.loads(text)
        except ValueError:
            value = None  # JSON lines under another ending
        if isinstance(value, dict):
            tables = [rows for rows in value.values() if isinstance(rows, list)]
            value = tables[0] if len(tables) == 1 else [value]
        if isinstance(value, list):
            return _checked(value, path)
    rows = []
    # Not `splitlines`, which also breaks at characters that may stand inside of a text (U+2028, U+0085).
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
    return _checked(rows, path)


def _checked(rows: list[Any], path: Path) -> list[dict[str, Any]]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise ValueError(f"{path}: row {number} is no object with named values but {type(row).__name__}")
    return rows


def _of_folder(path: Path, split: str) -> list[dict[str, Any]]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        from datasets import DatasetDict, load_from_disk

        saved = load_from_disk(str(path))
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise ValueError(f"{path} has the splits {', '.join(saved)}, not {split!r}")
            saved = saved[split]
        return _listed(saved)
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in FORMATS)
    named = [file for file in files if file.stem == split or file.stem.startswith((f"{split}-", f"{split}_"))]
    if not files:
        raise ValueError(f"{path} holds no {', '.join(FORMATS)} file, and `datasets` did not save it")
    if not named and len(files) > 1:
        raise ValueError(f"{path} holds {len(files)} files and none is named after the split {split!r}; name a file")
    return [row for file in named or files for row in _of_file(file)]


def _listed(dataset: Dataset) -> list[dict[str, Any]]:
    return [dict(row) for row in dataset]
