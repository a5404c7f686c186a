"""Links of the pages lead to files that are there, and to headings that these have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("bench", "csrc", "docs", "examples", "scripts", "tests", "unisd", "unisd_kernels")
ENDINGS = ("cpp", "cu", "h", "json", "md", "py", "sh", "svg", "yaml")
NAMED = re.compile(rf"(?<!--output )(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w/.-]*\.(?:{'|'.join(ENDINGS)}))\b")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])


def anchors(page: Path) -> set[str]:
    """Names of the headings as GitHub makes them: in small letters, without punctuation, with a hyphen for a blank."""
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(), flags=re.S | re.M)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        plain = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        number = next(i for i in range(1000) if (f"{plain}-{i}" if i else plain) not in found)
        found.add(f"{plain}-{number}" if number else plain)
    return found


def broken(page: Path, text: str) -> list[str]:
    """Links of a text on that page which lead nowhere."""
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        if not link.startswith("http") and not (target.exists() and (not anchor or anchor in anchors(target))):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    text = page.read_text()
    assert not broken(page, text)
    # Files that are named in passing; not what a command has written, and no pattern.
    missing = {name for name in NAMED.findall(text) if "NAME" not in name and not (ROOT / name).exists()}
    assert not missing


@pytest.mark.parametrize("link", ["docs/nothing.md", "#no-heading", "docs/design.md#no-heading", "README.mdx"])
def test_a_link_that_leads_nowhere_is_noticed(link):
    page = ROOT / "README.md"
    assert broken(page, f"[a]({link}) [b](docs/design.md#the-mathematics) [c](#install) [d](https://x.y/z)") == [link]
