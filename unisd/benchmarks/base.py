"""What a benchmark is: where its rows are, and what may be done with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unisd.prepare.sources import load_rows

Row = Mapping[str, Any]


def as_it_is(row: Row) -> Row | None:
    return row


@dataclass(frozen=True)
class Benchmark:
    """Rows of one origin, in one kind of task (`unisd.tasks`).

    Attributes:
        name: as the user types it.
        kind: of task: "choice", "code", "tools" or "open".
        hub: id of the hub; "" for rows that only a file has.
        splits: "train", "validation", "test" -> (configuration or None, split) on the hub. What is not there cannot be
            asked for.
        source: paper or page, for reports.
        licence: of the rows.
        adapt: from a row in its original format to one that its kind reads, or None for a row that does not belong.
        group: column by which accuracies are also reported; "" for none.
        evaluation_only: whether training on it is refused.
        secret: whether its texts are never printed or stored (its authors ask for that).
        where: what to do where the hub does not have it.
    """

    name: str
    kind: str
    hub: str
    splits: Mapping[str, tuple[str | None, str]]
    source: str
    licence: str
    adapt: Callable[[Row], Row | None] = as_it_is
    group: str = ""
    evaluation_only: bool = False
    secret: bool = False
    where: str = field(default="give a file in its original format")

    @property
    def default_split(self) -> str:
        """The split that an evaluation takes: the test's, else the last."""
        return "test" if "test" in self.splits else list(self.splits)[-1]

    def rows(self, split: str, file: str | None = None) -> list[dict[str, Any]]:
        """Rows of a split, in their order, as the kind of task reads them.

        Args:
            split: "train", "validation" or "test"; of a file, which has none, it is not looked at.
            file: a local file in the original format (`unisd.prepare.sources`), in place of the hub.

        Raises:
            ValueError: no such split, nothing on the hub, a file that cannot be read, no row that belongs.
        """
        if file is not None:
            raw: Sequence[Row] = load_rows(file, split=split)
        elif not self.hub:
            raise ValueError(f"{self.name} is not on the hub: {self.where}")
        elif split not in self.splits:
            raise ValueError(f"{self.name} has the splits {', '.join(self.splits)}, not {split!r}")
        else:
            config, name = self.splits[split]
            raw = load_rows(self.hub, split=name, config=config)
        kept = [dict(row) for row in map(self.adapt, raw) if row is not None]
        if not kept:
            raise ValueError(f"{file or self.hub}: none of its {len(raw)} rows belongs to {self.name}")
        return kept
