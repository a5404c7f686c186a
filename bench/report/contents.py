"""The contents of a page: links to its headings, by the names that GitHub gives these."""

from __future__ import annotations

import re


def contents(text: str) -> str:
    """An item for each heading of the second level, with those of the third below it in one line."""
    items: list[list[str]] = []
    seen: dict[str, int] = {}
    for marks, title in re.findall(r"^(#+) (.+)$", text, re.M):
        plain = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        seen[plain] = seen.get(plain, -1) + 1
        link = f"[{title}](#{plain}{f'-{seen[plain]}' if seen[plain] else ''})"
        if len(marks) == 2:
            items.append([link])
        elif len(marks) == 3:
            items[-1].append(link)
    return "\n".join(f"- {first}{': ' if others else ''}{', '.join(others)}" for first, *others in items)
