"""A figure stands with its machine: in README.md and in every page of docs/."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from bench.records import machine
from bench.report import pages

ROOT = pages.ROOT
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FOLDERS = sorted(path for path in pages.RESULTS.iterdir() if path.is_dir())
# As results and pages call them; a GPU by its number alone.
NAMES = re.compile(r"AMD EPYC|Intel\(R\) Xeon|\bH[12]00\b")
# What a clock, a counter of memory or an energy meter tells: as a column's title, or beside a number.
TITLE = re.compile(r"\btime\b|seconds|\bms\b|\bMB\b|\bGB\b|\bGiB\b|memory|minutes|tokens/s|\bJ\b|joules")
CELL = re.compile(r"\d ?(ms|s|MB|GB|GiB|J|minutes|tokens/s)\b")
# Counted rather than measured: of no machine.
COUNTED = re.compile(r"on paper|by count")


def sections(text: str) -> list[tuple[str, list[str]]]:
    """What stands above and in a section, and its tables; above are the headings with the words up to a lower one."""
    above: dict[int, str] = {}
    found = []
    for part in re.split(r"^(?=#{1,4} )", text, flags=re.M):
        level = len(part) - len(part.lstrip("#"))
        above = {n: words for n, words in above.items() if n < level} | {level: part}
        tables = [each[0] for each in re.finditer(r"(?:^\|.*\n)+", part, flags=re.M)]
        found.append(("\n".join(above.values()), tables))
    return found


def is_measured(table: str) -> bool:
    titles, _, *rows = table.splitlines()
    return any(CELL.search(row) for row in rows) or bool(
        TITLE.search(titles) and re.search(r"\| *\**\d[\d.,]*%?\** *[|(]", "".join(rows))
    )


def unnamed(text: str) -> list[str]:
    """First lines of the tables of measured figures whose section names no machine."""
    return [
        table.splitlines()[0]
        for words, tables in sections(text)
        for table in tables
        if is_measured(table) and not NAMES.search(words) and not COUNTED.search(words)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_tables_of_figures_name_their_machine(page):
    assert unnamed(page.read_text()) == []


def test_a_table_without_its_machine_is_noticed():
    table = "| peer | time / floor |\n|---|---|\n| ours | 1.22 |\n"
    assert unnamed(f"# Page\n\n## Speed\n\n{table}\nAMD EPYC, 2 threads\n") == []
    assert unnamed(f"# Page\n\n## Speed\n\n{table}") == ["| peer | time / floor |"]
    # The machine of another section is none.
    assert len(unnamed(f"# Page\n\n## Speed\n\n{table}\n## Others\n\nAMD EPYC\n")) == 1
    # That of the heading above is.
    assert unnamed(f"# Page\n\n## AMD EPYC\n\n### Speed\n\n{table}") == []


def test_result_files_that_are_quoted_exist_and_their_machine_is_named():
    for page in PAGES:
        for words, _ in sections(page.read_text()):
            for name in re.findall(r"bench/results/([\w./-]+\.json)", words.rpartition("\n#")[2]):
                # One of a family of names, or what a command's --output was called then.
                if re.search(r"[A-Z]{2}", name):
                    continue
                if f"--output bench/results/{name}" in words and f"`bench/results/{name}`" not in words:
                    continue
                path = pages.RESULTS / name
                assert path.exists(), f"{page.name}: {name}"
                environment = json.loads(path.read_text())["environment"]
                device = environment.get("device", "cpu")
                used = environment.get("cpu") or environment["CPU"].partition(",")[0]
                named = used if device == "cpu" else re.search(r"[A-Z]+\d+", device)[0]
                assert named in words, f"{page.name}: {name} is of {named}"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_a_folder_is_of_the_machine_it_is_named_after(folder):
    for path in folder.glob("*.json"):
        assert machine.slug(json.loads(path.read_text())["environment"]) == folder.name, path.name


CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: {model}
model name\t: AMD EPYC
flags\t\t: fpu avx2 avx512f {more}

processor\t: 1
"""


@pytest.mark.parametrize(
    ("model", "more", "slug", "title"),
    [
        (17, "avx512_bf16", "amd-epyc-f25-m17-avx512-bf16", "AMD EPYC (family 25, model 17, AVX512_BF16)"),
        (1, "", "amd-epyc-f25-m1-avx512f", "AMD EPYC (family 25, model 1, AVX512F)"),
    ],
)
def test_processors_of_one_name_are_told_apart(model, more, slug, title, tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text(CPUINFO.format(model=model, more=more))
    monkeypatch.setattr(machine, "_CPUINFO", info)
    monkeypatch.setattr(machine, "processor_name", lambda: "AMD EPYC")
    found = machine.processor()
    environment = {"cpu": found["name"], "processor": found, "instruction_set": "AVX512"}
    assert (machine.slug(environment), machine.title(environment)) == (slug, title)
    # Of before family and model were kept.
    old = {"cpu": "Intel(R) Xeon(R) Processor", "instruction_set": "AVX512"}
    assert machine.slug(old) == "intel-xeon-avx512"


def test_this_machine_has_a_folder_name():
    found = machine.processor()
    assert re.fullmatch(r"[a-z0-9-]+", machine.slug({"cpu": found["name"], "processor": found, "instruction_set": "x"}))
    assert Path(pages.RESULTS).is_dir()


def test_the_page_of_other_machines_is_that_of_its_results(monkeypatch):
    found = importlib.util.spec_from_file_location("machines", ROOT / "scripts" / "machines.py")
    script = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "machines", script)  # where dataclasses look their module up
    found.loader.exec_module(script)
    results = json.loads(script.RESULTS.read_text())
    names = [row.name for row in script.machines(["2.10.0", "2.15.0"])]
    assert set(results) <= set(names)
    assert script.PAGE.read_text() == script.page(results, names)
