"""A commit is checked by what `make lint` runs, no more and no less."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def commands(text: str, pattern: str) -> list[str]:
    return re.findall(pattern, text, re.MULTILINE)


def test_the_hooks_are_the_lint():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [hook["entry"] for hook in local["hooks"]]
    lint = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    assert hooks == [command.replace("$(BIN)", ".venv/bin") for command in commands(lint, r"^\t(\S.*)$")]
    script = (ROOT / "scripts" / "check.sh").read_text().split("\nlint() {")[1].split("\n}")[0]
    assert hooks == [
        command.replace('"$bin/', ".venv/bin/").replace('"', "") for command in commands(script, r"^ +(\"\$bin.*) \|\|")
    ]
