"""Preparing rows: what is shown to whom, what is rejected, and that a killed run loses nothing."""

from __future__ import annotations

import json
import os
import re
import signal

import numpy as np
import pytest
import torch

from tests.trainer import tiny_run
from unisd.cli import main
from unisd.cli.rows_to_prepare import cached_folder
from unisd.contexts import LengthLimit
from unisd.generation import Request, Sampling
from unisd.prepare import embeddings
from unisd.prepare.pipeline import prepare
from unisd.prepare.questions import question_key
from unisd.prepare.settings import PrepareSettings
from unisd.prepare.sources import load_rows

ROWS = [{"question": f"What is thing {i}?", "answer": f"Thing {i} is a number near {i * i}."} for i in range(12)]


class Writer:
    """A model that answers every request, differently by seed, and may end the process in the middle."""

    identity, batch_size = "writer", 3

    def __init__(
        self, reply=lambda prompt, seed: json.dumps({"answer": f"It is a stone of {seed % 1000} grams."}), kill_at=None
    ):
        self.reply, self.kill_at, self.asked, self.written = reply, kill_at, 0, 0

    def batches(self, requests):
        places = list(range(len(requests)))
        return [places[i : i + self.batch_size] for i in range(0, len(places), self.batch_size)]

    def replies(self, requests, sampling):
        for place, request in enumerate(requests):
            if self.kill_at is not None and self.written == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.written += 1
            yield place, self.reply(str(request.prompt), request.seed)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path / "cache"))


def prepared(rows=ROWS, writer=None, **settings):
    return prepare(rows, PrepareSettings(**settings), generator=lambda: writer or Writer(), progress=False)


@pytest.mark.parametrize("settings", [{}, {"context_pool": 5}, {"demos_per_context": 2}], ids=str)
def test_no_row_is_shown_its_own_question(settings):
    rows = [*ROWS, {"question": "what is  THING 3", "answer": "The same again."}]
    result = prepared(rows, negatives="none", **settings).rows
    for row in result:
        assert len(row["auxiliary_prompts"]) == len(set(row["auxiliary_prompts"])) == 3
        for prompt in row["auxiliary_prompts"]:
            shown = prompt.removesuffix(row["prompt"])
            assert shown != prompt
            keys = [question_key(line.removeprefix("Question: ")) for line in shown.splitlines() if "Question:" in line]
            assert keys
            assert question_key(row["question"]) not in keys
            assert row["answer"] not in shown
    assert prepared(rows, negatives="none", **settings).rows == result
    assert prepared(rows, negatives="none", seed=7, **settings).rows != result


def test_rows_of_one_set_begin_alike():
    rows = prepared(negatives="none", context_pool=4).rows
    begins = {}
    for row in rows:
        for number, prompt in zip(row["auxiliary_pool"], row["auxiliary_prompts"], strict=True):
            begins.setdefault(number, set()).add(prompt.removesuffix(row["prompt"]))
    assert sorted(begins) == [0, 1, 2, 3]
    assert all(len(texts) == 1 for texts in begins.values())


def test_negatives_are_validated_counted_and_drawn():
    def reply(prompt, seed):
        number = next(i for i in range(11, -1, -1) if f"thing {i}?" in prompt)
        if number == 4:
            return ROWS[4]["answer"]  # never wrong
        return json.dumps({"answer": f"Thing {number} is a colour like {seed % 7}."})

    result = prepared(writer=Writer(reply))
    assert result.report.kept == 11
    assert result.report.dropped == {"no valid negative": 1}
    assert result.report.rejected == {"the answer is the right one": 12}  # 4 requests, 3 tries each
    assert result.report.asked == 48
    assert all(
        "colour" in row["negative_prompt"] and row["answer"] not in row["negative_prompt"] for row in result.rows
    )
    assert 4 not in [row["row"] for row in result.rows]


def test_what_no_view_can_hold_is_dropped_before_anybody_reads_it():
    asked = []

    def reply(prompt, seed):
        asked.append(prompt)
        return json.dumps({"answer": f"It is a stone of {seed % 1000} grams."})

    rows = [*ROWS[:6], {"question": "What is long?", "answer": "so long " * 300}, *ROWS[6:]]
    result = prepare(
        rows,
        PrepareSettings(),
        generator=lambda: Writer(reply),
        tokenizer=tiny_run.tokenizer(),
        limit=LengthLimit(400, None),
        every_view=False,
        progress=False,
    )
    [(reason, count)] = result.report.dropped.items()
    assert re.fullmatch(r"a view is too long \(more than max_prompt_length=400; the longest has 6\d\d tokens\)", reason)
    assert count == 1
    assert [row["row"] for row in result.rows] == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]
    assert asked
    assert not any("so long" in text for row in result.rows for text in (*row["auxiliary_prompts"], *asked))


def test_another_rows_answer_is_a_negative_that_differs():
    rows = [{"question": f"Q{i}?", "answer": "yes" if i % 3 else "no"} for i in range(9)]
    for row in prepared(rows, negatives="other", num_auxiliary=0).rows:
        assert ("yes" if row["answer"] == "no" else "no") in row["negative_prompt"].split("task:")[1]


@pytest.mark.parametrize("kill_at", [0, 1, 7, 30])
def test_a_killed_run_goes_on_to_the_same_rows(tmp_path, monkeypatch, kill_at):
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path / "undisturbed"))
    expected, whole = prepared(writer=(writer := Writer())).rows, writer.written
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path / "killed"))
    pid = os.fork()
    if pid == 0:
        prepared(writer=Writer(kill_at=kill_at))
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    again = Writer()
    assert prepared(writer=again).rows == expected
    # What was stored before the kill is not written again.
    assert again.written == whole - kill_at // Writer.batch_size * Writer.batch_size
    # And another run asks nothing at all.
    third = Writer()
    assert prepared(writer=third).rows == expected
    assert third.written == 0


def test_induced_instructions_differ_within_a_row_and_hold_no_example():
    rows = [
        {"question": f"What is thing {i}?", "answer": f"A thing of kind {chr(97 + i)} and size {i}."} for i in range(12)
    ]
    texts = [
        "Read the question slowly and name what it asks for. Recall the facts that decide it. Then say it briefly.",
        "A short answer is best. Check the unit that is asked for before writing. Leave out whatever nobody asked.",
        "Find the subject first. Think about which property decides the matter. State the property with its value.",
    ]

    def reply(prompt, seed):
        shown = re.search(r"A thing of kind \w and size \d+\.", prompt)[0]
        return [*texts, f"As shown, {shown} That settles it. Always write this."][seed % 4]

    result = prepared(rows, Writer(reply), contexts="induction", negatives="none", num_auxiliary=2)
    for row in result.rows:
        assert len(set(row["auxiliary_prompts"])) == 2
        assert all("Always write this" not in prompt for prompt in row["auxiliary_prompts"])
    assert result.report.rejected["the instruction repeats an example"] > 0


def test_nearest_rows_are_exact_in_any_blocks():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    groups = [i // 2 for i in range(50)]
    similarity = torch.from_numpy(vectors @ vectors.T)
    similarity[torch.tensor(groups)[:, None] == torch.tensor(groups)] = -2
    similarity[:, 1::2] = -2  # of two rows with one question, the first
    expected = similarity.topk(5).indices.numpy()
    for block in (7, 50, 64):
        found = embeddings.nearest_rows(vectors, groups, 5, block=block, progress=False)
        np.testing.assert_array_equal(found, expected)
    few = embeddings.nearest_rows(vectors[:4], [0, 0, 1, 2], 5, progress=False)
    assert (few[0] >= 0).sum() == 2
    assert set(few[0][few[0] >= 0]) == {2, 3}


def test_retrieval_takes_the_nearest_in_slices(monkeypatch):
    angles = np.linspace(0, 1, 12)
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    monkeypatch.setattr(embeddings, "embed", lambda texts, encoder, progress: vectors)
    first = prepared(negatives="none", contexts="retrieval", num_auxiliary=2).rows[0]
    assert [f"thing {n}?" in prompt for n, prompt in zip((1, 2), first["auxiliary_prompts"], strict=True)] == [
        True,
        True,
    ]


def test_every_source_gives_the_same_rows(tmp_path):
    from datasets import Dataset

    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps({"data": ROWS, "version": 1}))
    dataset = Dataset.from_list(ROWS)
    dataset.to_csv(tmp_path / "c.csv")
    dataset.to_parquet(tmp_path / "d.parquet")
    dataset.save_to_disk(tmp_path / "e")
    (tmp_path / "f").mkdir()
    dataset.to_parquet(tmp_path / "f/train-00000.parquet")
    dataset.to_parquet(tmp_path / "f/test-00000.parquet")
    for name in ("a.jsonl", "b.json", "c.csv", "d.parquet", "e", "f"):
        assert load_rows(str(tmp_path / name)) == ROWS, name
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question"\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: not JSON"):
        load_rows(str(tmp_path / "bad.jsonl"))
    with pytest.raises(ValueError, match="there is no such file"):
        load_rows(str(tmp_path / "none.jsonl"))


def test_columns_that_cannot_be_told_are_asked_for(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"ask": row["question"], "reply_text": row["answer"]}) for row in ROWS))
    tiny_run.llama().save_pretrained(tmp_path / "model")
    tiny_run.tokenizer().save_pretrained(tmp_path / "model")
    flags = ["--negatives", "none", "--model", str(tmp_path / "model")]
    assert main(["prepare", str(file), "-o", str(tmp_path / "out"), *flags]) == 2
    assert "name it as --prompt_column" in capsys.readouterr().err
    named = ["--prompt_column", "ask", "--answer_column", "reply_text"]
    assert main(["prepare", str(file), "-o", str(tmp_path / "out"), *flags, *named]) == 0
    said = capsys.readouterr().out
    assert "12 of 12 rows kept (open questions)" in said
    assert re.search(r"took: reading \d+\.\d s, contexts .* s; at most \d+\.\d\d GiB of memory", said)
    assert ROWS[3]["answer"] not in said
    assert main(["show", str(tmp_path / "out"), "--row", "3"]) == 0
    assert ROWS[3]["question"] in capsys.readouterr().out
    assert (tmp_path / "out/row-3.html").is_file()


def test_train_takes_raw_rows(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    words = [{"question": tiny_run.words(5 * i, 4), "answer": tiny_run.words(9 * i, 3)} for i in range(8)]
    # One that the model has no positions for, and that nobody is to be shown.
    words.insert(3, {"question": tiny_run.words(1, 4), "answer": tiny_run.words(2, 600)})
    file.write_text("\n".join(map(json.dumps, words)))
    tiny_run.llama(max_position_embeddings=512).save_pretrained(tmp_path / "model")
    tiny_run.tokenizer().save_pretrained(tmp_path / "model")
    flags = ["--dataset", str(file), "--model_name_or_path", str(tmp_path / "model"), "--bf16", "false"]
    flags += [
        "--report_to",
        "none",
        "--max_completion_length",
        "4",
        "--num_train_epochs",
        "1",
        "--disable_tqdm",
        "true",
    ]
    flags += ["--drift_probe_every", "0", "--save_strategy", "no", "--gradient_checkpointing", "false"]
    for preset in ("unisd_star", "sft", "gkd"):
        assert main(["train", *flags, "--preset", preset, "--output_dir", str(tmp_path / preset)]) == 0
        said = capsys.readouterr()
        assert f"unisd eval retention drift behaviour --model {tmp_path / preset}" in said.out
        assert "8 rows are fewer than a step of 4 x 4 takes: it is 4 x 2 here" in said.err
        # Neither baseline reads more than the gold answer: the second one finds the rows of the first.
        assert ("the rows were prepared before" if preset == "gkd" else "8 of 9 rows kept") in said.err
        assert "rows are dropped" not in said.err  # by the trainer, which checks every view
    # The same rows again are not prepared again.
    assert main(["train", *flags, "--preset", "unisd_star", "--output_dir", str(tmp_path / "again")]) == 0
    assert "the rows were prepared before" in capsys.readouterr().err


def test_what_decides_the_rows_decides_their_folder():
    plain, other = PrepareSettings(), PrepareSettings(seed=1)
    asked = [(ROWS, plain, None), (ROWS[1:], plain, None), (ROWS, other, None), (ROWS, plain, LengthLimit(9, None))]
    folders = {cached_folder(rows, settings, "model", "vllm", limit) for rows, settings, limit in asked}
    folders |= {cached_folder(ROWS, plain, "other", "vllm", None), cached_folder(ROWS, plain, "model", "url", None)}
    assert len(folders) == 6


def test_a_reply_store_asks_for_nothing_twice(tmp_path):
    from unisd.prepare.replies import ReplyStore

    writer = Writer()
    store = ReplyStore(writer, tmp_path / "replies.sqlite")
    requests = [Request(f"p{i}", i) for i in range(7)]
    first = store.replies(requests, Sampling())
    assert (store.replies(requests, Sampling()), writer.written) == (first, 7)
    store.replies(requests, Sampling(max_new_tokens=9))
    assert writer.written == 14
