"""Texts come out of every kind of file as they went in."""

from __future__ import annotations

import csv
import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from unisd.prepare.sources import load_rows

ROWS = [
    {"question": "Which agent of\u2028two lines, \u0085 and \u201cquotes\u201d?", "answer": "007"},
    {"question": "Which gas, if any?", "answer": "None"},
    {"question": "A line\nmore?", "answer": "NA"},
]


def write(folder, name):
    path = folder / name
    if name.endswith(".jsonl"):
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n", encoding="utf-8-sig")
    elif name == "table.json":
        path.write_text(json.dumps({"version": 1, "data": ROWS}))
    elif name.endswith(".json"):
        path.write_text(json.dumps(ROWS))
    elif name.endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, ROWS[0])
            table.writeheader()
            table.writerows(ROWS)
    elif name.endswith(".parquet"):
        Dataset.from_list(ROWS).to_parquet(path)
    elif name == "saved":
        Dataset.from_list(ROWS).save_to_disk(path)
    elif name == "splits":
        DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(path)
    else:
        path.mkdir()
        write(path, "train-0.jsonl")
        write(path, "test.json")
    return path


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.json", "table.json", "rows.csv", "rows.parquet", "saved", "splits", "files"]
)
def test_every_source_gives_the_rows(tmp_path, monkeypatch, name):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    assert load_rows(str(write(tmp_path, name))) == ROWS


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"question": 1}\n{"question"\n', "line 2: not JSON"),
        ("a.json", "[1, 2]", "row 1 is no object"),
        ("a.jsonl", "\n", "has no rows"),
        ("a.txt", "x", "is not one of .json"),
        ("a.csv", "question,answer\na,b\nc,d,e\n", "line 3: more values than the first line has columns"),
        (
            "a.csv",
            "question;answer\nOne, two?;b\n",
            "has ';' between its names, 'question;answer', but commas are read",
        ),
        ("a.csv", "question\tanswer\na\tb\n", "between its names"),
        ("a.csv", "question,answer,answer\na,b,c\n", "names the column 'answer' twice"),
        ("a.csv", "question,answer\nWo?,im Caf\xe9\n".encode("latin-1"), "line 2: byte 0xe9 is not UTF-8"),
        ("a.jsonl", '{"question": "\xfc"}\n'.encode("latin-1"), "line 1: byte 0xfc is not UTF-8"),
        ("a.jsonl", '{"question": "a"}'.encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-4], "is not whole or not packed by gzip"),
        ("a.jsonl.gz", "{}", "is not whole or not packed by gzip"),
        ("a.parquet", "no parquet", "a.parquet cannot be read: Parquet magic bytes not found"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, text, said):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=said):
        load_rows(str(tmp_path / name))


def test_a_name_that_is_nothing_here(tmp_path, monkeypatch):
    def load_dataset(name, config, split):
        raise FileNotFoundError(f"{name} was not found")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"no file or folder here, and no dataset of the hub: .*rows was not found"):
        load_rows(str(tmp_path / "rows"))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("a.jsonl", ['{"question": "a", "answer": "b"}', '{"question": "c", "answer": "d"}', ""]),
        ("a.csv", ["question,answer", "a,b", "c,d", ""]),
    ],
)
def test_line_ends_of_every_system(tmp_path, name, lines, end):
    (tmp_path / name).write_bytes(end.join(lines).encode())
    assert load_rows(str(tmp_path / name)) == [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
