"""docs/kernel-resources.md has a row for every variant that can be compiled; what the rows say takes minutes to check,
which is what the command in there is for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.roofline.ahead_of_time import Report, Variant, table, variants
from bench.roofline.targets import ARCHITECTURES

ROOT = Path(__file__).parents[2]
# No default may spill; a candidate may, because a measurement decides.
SPILLED, ADVISORIES = 5, -1


def rows() -> list[list[str]]:
    """Cells of the table, without its head."""
    text = (ROOT / "docs" / "kernel-resources.md").read_text()
    generated = text.split("<!-- generated: begin -->\n")[1].split("<!-- generated: end -->")[0].strip()
    head, body = generated.splitlines()[:2], generated.splitlines()[2:]
    assert head == table([]).splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in body]


def tile(variant: Variant) -> str:
    config = variant.config
    if config is None:
        return ""
    return f"{config.rows}x{config.columns}x{config.width}, {config.warps} warps, {config.stages} stages"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_variant_has_its_row(architecture):
    expected = Counter((variant.name, tile(variant)) for variant in variants(architecture, everything=True))
    assert len(expected) > 20
    assert Counter((row[1], row[2]) for row in rows() if row[0] == architecture) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_default_spills_and_nothing_is_advised_against(architecture):
    defaults = {(variant.name, tile(variant)) for variant in variants(architecture)}
    # The first of a name and tile is the default's.
    spilled = {(row[1], row[2]): int(row[SPILLED]) for row in reversed(rows()) if row[0] == architecture}
    assert {key: spilled[key] for key in defaults} == dict.fromkeys(defaults, 0)
    assert not any(row[ADVISORIES] for row in rows())


def test_the_command_writes_such_a_table():
    report = Report("sm_90", "pair", "128x128x64", 2048, 255, 7, 5000, 8, 9, 1, ("C7515",))
    assert table([report]).splitlines()[-1].split("|")[1 + SPILLED].strip() == "7"
    assert table([report]).splitlines()[-1].split("|")[-2].strip() == "C7515"
