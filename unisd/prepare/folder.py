"""Prepared rows on disk: a folder that `datasets` reads, with a record of how they were made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from datasets.utils import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

from unisd.prepare.pipeline import Prepared
from unisd_kernels.files import replacing
from unisd_kernels.version import __version__

RECORD = "prepared.json"


def save_prepared(prepared: Prepared, folder: Path, settings: Mapping[str, Any]) -> Dataset:
    """Write the rows and their record, in one step; the rows as they are read again."""
    with replacing(folder) as new, _without_bars():
        dataset_of(prepared).save_to_disk(str(new))
        record = {
            "settings": dict(settings),
            "report": prepared.report.as_dict(),
            "versions": {"unisd-kernels": __version__, "datasets": metadata.version("datasets")},
        }
        (new / RECORD).write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    return load_prepared(folder)


def dataset_of(prepared: Prepared) -> Dataset:
    """The rows as a dataset."""
    return Dataset.from_list(prepared.rows)


@contextmanager
def _without_bars() -> Iterator[None]:
    shown = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def is_prepared(folder: str | Path) -> bool:
    """Whether the folder holds prepared rows."""
    return (Path(folder).expanduser() / RECORD).is_file()


def load_prepared(folder: str | Path) -> Dataset:
    """The rows of a folder that `save_prepared` wrote."""
    return load_from_disk(str(Path(folder).expanduser()))


def folder_of(rows: Any) -> Path | None:
    """The folder of prepared rows that a dataset, or a choice of its rows, was read from; None for any other."""
    files = getattr(rows, "cache_files", None) or [{"filename": ""}]
    folder = Path(files[0]["filename"]).parent
    return folder if is_prepared(folder) else None
