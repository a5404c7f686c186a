"""Prepared rows on disk, and the replies behind them: whole after a kill, shared between runs."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal

import pytest
from datasets import Dataset

from tests.prepare.test_prepare import Writer, _own_cache  # noqa: F401
from tests.trainer import tiny_run
from unisd.contexts import LengthLimit
from unisd.generation import Request, Sampling
from unisd.prepare.folder import RECORD, is_prepared, load_prepared, save_prepared
from unisd.prepare.pipeline import prepare
from unisd.prepare.replies import ReplyStore
from unisd.prepare.settings import PrepareSettings

ROWS = [{"question": tiny_run.words(5 * i, 4), "answer": tiny_run.words(9 * i, 3)} for i in range(8)]
REQUESTS = [Request(f"prompt {number}", number) for number in range(4)]
SAMPLING = Sampling(0.7, 16)


def prepared(rows, **options):
    return prepare(rows, PrepareSettings(num_auxiliary=2, negatives="none"), progress=False, **options)


def test_a_kill_while_saving_leaves_what_was_there(tmp_path, monkeypatch):
    folder = tmp_path / "prepared"
    old, new = prepared(ROWS[:5]), prepared(ROWS)
    save_prepared(old, folder, {"which": "old"})

    def killed_while_saving():
        saved = Dataset.save_to_disk

        def save_and_die(*arguments, **options):
            saved(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(Dataset, "save_to_disk", save_and_die)
        save_prepared(new, folder, {"which": "new"})

    process = multiprocessing.get_context("fork").Process(target=killed_while_saving)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert load_prepared(folder).to_list() == old.rows
    assert is_prepared(folder)
    save_prepared(new, folder, {"which": "new"})
    assert load_prepared(folder).to_list() == new.rows
    record = json.loads((folder / RECORD).read_text())
    assert record["settings"] == {"which": "new"}
    assert record["report"]["kept"] == len(ROWS)


def test_too_long_views_are_dropped_with_their_number_and_the_maximum():
    rows = [{**row, "answer": tiny_run.words(0, 60 + i)} if i < 2 else row for i, row in enumerate(ROWS)]
    result = prepared(rows, tokenizer=tiny_run.tokenizer(), limit=LengthLimit(10_000, None))
    sizes = result.report.longest
    limit = sizes["teacher"] - 2  # the longer one of the two exceeds it
    result = prepared(rows, tokenizer=tiny_run.tokenizer(), limit=LengthLimit(limit, None))
    assert result.report.kept + sum(result.report.dropped.values()) == len(rows)
    (reason,) = result.report.dropped
    assert f"more than max_prompt_length={limit}" in reason
    assert f"the longest has {max(sizes.values())} tokens" in reason
    assert max(result.report.longest.values()) <= limit


@pytest.mark.parametrize(
    ("request_", "sampling", "identity"),
    [
        (Request("other", 0), SAMPLING, "writer"),
        (Request("prompt 0", 1), SAMPLING, "writer"),
        (REQUESTS[0], Sampling(0.8, 16), "writer"),
        (REQUESTS[0], Sampling(0.7, 17), "writer"),
        (REQUESTS[0], Sampling(0.7, 16, 0.9), "writer"),
        (REQUESTS[0], SAMPLING, "other weights"),
    ],
)
def test_what_decides_a_reply_decides_its_key(request_, sampling, identity):
    ReplyStore(Writer()).replies(REQUESTS[:1], SAMPLING)
    writer = Writer()
    writer.identity = identity
    ReplyStore(writer).replies([request_], sampling)
    assert writer.written == 1


def test_of_two_runs_at_once_both_go_on_with_the_same_reply():
    quick = Writer(reply=lambda prompt, seed: f"quick {seed}")

    def reply(prompt, seed):
        ReplyStore(quick).replies(REQUESTS, SAMPLING)  # while the other one still writes
        return f"slow {seed}"

    slow = Writer(reply)
    slow.batch_size = quick.batch_size = 4
    assert ReplyStore(slow).replies(REQUESTS, SAMPLING) == [f"quick {seed}" for seed in range(4)]
