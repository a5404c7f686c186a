"""The runs of a sweep: which there are, what they are called, and what is there of each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

FINISHED = "sweep.json"
"""File in the folder of a run that is finished, evaluations included."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        data: source of its rows, as for `unisd train --dataset`.
        preset, seed: of the run.
    """

    data: str
    preset: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{Path(self.data).stem}-{self.preset}-{self.seed}"


def cells(data: list[str], presets: list[str], seeds: list[int]) -> list[Cell]:
    """All combinations; seed by seed, so that every preset has a run before one has two.

    Raises:
        ValueError: two sources whose runs would have the same name.
    """
    made = [Cell(d, p, s) for s, d, p in product(dict.fromkeys(seeds), dict.fromkeys(data), dict.fromkeys(presets))]
    names: dict[str, Cell] = {}
    for cell in made:
        other = names.setdefault(cell.name, cell)
        if other != cell:
            raise ValueError(f"{other.data} and {cell.data} would both be {cell.name}: rename one of them")
    return made


def finished(folder: Path) -> dict[str, Any] | None:
    """What is recorded of a finished run; None for one that is not."""
    file = folder / FINISHED
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
