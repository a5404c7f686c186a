"""Views as one page of HTML that needs nothing else: side by side on a desktop, one below the other on a phone."""

from __future__ import annotations

import html
from collections.abc import Sequence

from unisd.show.views import ShownView

_STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1c1e21; --paper: #ffffff; --line: #d5d9de; --extra: #fff3d6; --soft: #5b6470;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --paper: #16181b; --line: #3a3f45; --extra: #4a3c14; --soft: #a4adb8; }
}
* { box-sizing: border-box; }
body { margin: 0; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
h1 { font-size: 1.25rem; margin: 0 0 .25rem; }
p { margin: 0 0 1rem; color: var(--soft); }
mark { background: var(--extra); color: inherit; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
section { border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; min-width: 0; }
h2 { font-size: 1.05rem; margin: 0; }
h2 small { font-weight: normal; color: var(--soft); }
section p { font-size: .9rem; margin: .1rem 0 .6rem; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.45 ui-monospace, monospace; }
"""


def page(views: Sequence[ShownView], title: str) -> str:
    """The page of some views."""
    sections = "\n".join(_section(view) for view in views)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        "<p>What each model reads before the completion. <mark>Marked</mark>: what the student does not read.</p>\n"
        f"<main>\n{sections}\n</main>\n</body>\n</html>\n"
    )


def _section(view: ShownView) -> str:
    parts = "".join(
        f"<mark>{html.escape(text)}</mark>" if differs else html.escape(text) for text, differs in view.parts
    )
    tokens = "" if view.tokens is None else f" <small>{view.tokens} tokens</small>"
    return (
        f"<section>\n<h2>{html.escape(view.name.capitalize())}{tokens}</h2>\n<p>{html.escape(view.what)}</p>\n"
        f"<pre>{parts}</pre>\n</section>"
    )
