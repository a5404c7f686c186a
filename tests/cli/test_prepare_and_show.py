"""`unisd prepare` and `unisd show` with a tiny model; processes that prepare the rows of one run."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk

from unisd.cli import main
from unisd.cli.data import DataArguments
from unisd.cli.errors import CommandError
from unisd.cli.rows_to_prepare import prepared_rows

MARKUP = '<b>bold</b> & "quoted"'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [{"ask": f"What is {MARKUP} number {number}?", "reply": f"it is {number * 37}"} for number in range(6)]
    rows.append({"ask": "", "reply": "nothing"})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def prepared(file: Path, base: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "prepared"
    columns = ["--prompt_column", "ask", "--answer_column", "reply"]
    made = ["--negatives", "other", "--num_auxiliary", "2", "--model", str(base), "-o", str(folder)]
    assert main(["prepare", str(file), *columns, *made]) == 0
    return folder


def test_only_prepared_folders_are_replaced(file: Path, prepared: Path, base: Path, tmp_path: Path, capsys):
    arguments = ["prepare", str(file), "--prompt_column", "ask", "--answer_column", "reply", "--negatives", "none"]
    arguments += ["--model", str(base)]
    assert main([*arguments, "-o", str(prepared)]) == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert main([*arguments, "-o", str(prepared), "--overwrite"]) == 0
    assert "negative_prompt" not in load_from_disk(str(prepared)).column_names
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for taken in (mine, file):
        assert main([*arguments, "-o", str(taken), "--overwrite"]) == 2
        assert "was not written by unisd prepare" in capsys.readouterr().err
    assert (mine / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("width", [50, 100, 200])
def test_show_fits_the_terminal(prepared: Path, base: Path, tmp_path: Path, capsys, width: int):
    capsys.readouterr()
    page = tmp_path / "row.html"
    assert (
        main(["show", str(prepared), "--row", "3", "--width", str(width), "--html", str(page), "--model", str(base)])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()[:-2]
    assert max(map(len, lines)) <= width
    heads = [line for line in lines if "TEACHER" in line or "NEGATIVE" in line]
    assert len(heads) == {50: 2, 100: 2, 200: 1}[width]  # one, two and five columns
    assert all("tokens)" in line for line in heads)
    html = page.read_text()
    assert "<b>bold</b>" not in html
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; &quot;quoted&quot; number 3" in html
    assert html.count("<section>") == 5
    assert "it is 111" in html  # the gold, in the teacher's view


def test_a_row_that_is_not_there(prepared: Path, tmp_path: Path, capsys):
    assert main(["show", str(prepared), "--row", "6"]) == 2
    assert "has the rows 0 to 5" in capsys.readouterr().err
    assert main(["show", str(tmp_path)]) == 2
    assert "holds no prepared rows" in capsys.readouterr().err


class Run:
    """What is read of the settings of one of two processes, here of one of two threads."""

    world_size, device, disable_tqdm, seed = 2, torch.device("cpu"), True, 42
    reads_negative, reads_auxiliary, is_supervised, num_auxiliary = False, True, False, 2
    teacher_template = study_sentence = None
    trust_remote_code = False

    def __init__(self, process_index: int, done: threading.Event) -> None:
        self.process_index, self._done = process_index, done

    @contextmanager
    def main_process_first(self, local: bool, desc: str) -> Iterator[None]:
        """As in transformers: the others wait until the first one is through, well or not."""
        if self.process_index:
            self._done.wait()
        try:
            yield
        finally:
            self._done.set()


def rows_of_both(raw: list[dict[str, str]]) -> list[object]:
    def read(index: int) -> object:
        try:
            return prepared_rows(raw, DataArguments(dataset="x"), Run(index, done), "").to_list()
        except (CommandError, ValueError) as error:
            return str(error)

    done = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        return [result.result(60) for result in [pool.submit(read, index) for index in (1, 0)]]


def test_the_first_process_prepares_and_the_others_read(capsys):
    raw = [{"question": f"Which is {number}?", "answer": f"It is {number}."} for number in range(6)]
    second, first = rows_of_both(raw)
    assert first == second
    assert len(first) == 6
    assert capsys.readouterr().err.count("preparing 6 rows") == 1
    second, first = rows_of_both([raw[0]] * 3)
    assert "ask the same question" in first
    assert "the first process has not put" in second
