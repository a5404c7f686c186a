"""README's presets are all of them, and the public names are documented."""

from __future__ import annotations

import re
from pathlib import Path

import unisd_kernels

ROOT = Path(__file__).parents[2]


def test_every_preset_stands_in_the_table():
    from unisd.presets import PRESETS, is_paper

    text = (ROOT / "README.md").read_text()
    table = text[text.index("## The mechanisms") :].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", table))
    assert {name for name in PRESETS if not is_paper(name)} <= named


def test_public_names_are_documented():
    for name in unisd_kernels.__all__:
        if name not in ("__version__", "reference"):
            assert getattr(unisd_kernels, name).__doc__, name
