"""Raw rows: from files, folders, `datasets` folders and the hub. `datasets` is imported where it reads."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
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
    return format_of(path) is not None or path.exists()


def format_of(path: Path) -> str | None:
    """The ending in `FORMATS` that tells a file's format, `.jsonl` of rows.jsonl.gz; None for a file of another one."""
    endings = [ending.lower() for ending in path.suffixes]
    packed = len(endings) > 1 and endings[-1] == ".gz" and FORMATS.get(endings[-2]) == "json"
    ending = endings[-2] if packed else path.suffix.lower()
    return ending if ending in FORMATS else None


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
    if path.is_file() or format_of(path):
        rows = _of_file(path)
    elif path.is_dir():
        rows = _of_folder(path, split)
    else:
        rows = _listed(from_hub(source, split, config))
    if not rows:
        raise ValueError(f"{source} has no rows")
    return rows


def from_hub(source: str, split: str, config: str | None) -> Dataset:
    """A dataset by its id.

    Raises:
        ValueError: it cannot be had, in the words of `datasets`: an id may be a path that was misspelt.
    """
    from datasets import load_dataset

    try:
        return load_dataset(source, config, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} is no file or folder here, and no dataset of the hub: {error}") from error


def _of_file(path: Path) -> list[dict[str, Any]]:
    ending = format_of(path)
    if ending is None:
        raise ValueError(f"{path} is not one of {', '.join(FORMATS)}")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    # Neither through `datasets`: it wants one type in a column, where an answer may be a text here and messages there,
    # and it guesses types, so that the answers 007, None and NA would be 7 and two missing ones.
    if ending == ".csv":
        return _of_csv(path)
    if ending != ".parquet":
        return _of_json(path)
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return _listed(load_dataset(FORMATS[ending], data_files=str(path), split="train"))
    except (ValueError, DatasetGenerationError) as error:
        raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from None


def _text(path: Path) -> str:
    """The text of a file, unpacked, with every line end as it is."""
    content = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not whole or not packed by gzip ({error})") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; save the file in that encoding "
            "(from Excel: as 'CSV UTF-8')"
        ) from None


def _of_csv(path: Path) -> list[dict[str, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    names = list(reader.fieldnames or ())
    if len(names) == 1 and (other := next((mark for mark in ";\t|" if mark in names[0]), None)):
        raise ValueError(
            f"{path}: the first line has {other!r} between its names, {names[0]!r}, but commas are read; save the file "
            "with commas, or as .jsonl"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: the first line names the column {twice[0]!r} twice; rename one")
    rows = []
    for row in reader:
        if None in row:
            raise ValueError(
                f"{path}, line {reader.line_num}: more values than the first line has columns ({len(names)}); put "
                "texts with commas into double quotes"
            )
        rows.append(dict(row))
    return rows


def _of_json(path: Path) -> list[dict[str, Any]]:
    text = _text(path)
    if format_of(path) == ".json":
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
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
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
    files = sorted(file for file in path.iterdir() if format_of(file))
    named = [file for file in files if file.stem == split or file.stem.startswith((f"{split}-", f"{split}_"))]
    if not files:
        raise ValueError(f"{path} holds no {', '.join(FORMATS)} file, and `datasets` did not save it")
    if not named and len(files) > 1:
        raise ValueError(f"{path} holds {len(files)} files and none is named after the split {split!r}; name a file")
    return [row for file in named or files for row in _of_file(file)]


def _listed(dataset: Dataset) -> list[dict[str, Any]]:
    return [dict(row) for row in dataset]
