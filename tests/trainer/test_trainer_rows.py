"""Rows are checked at construction: one report, numbers of the file, rows that are too long, the cache, streams."""

import logging

import pytest
from datasets import Dataset, load_dataset
from torch.utils.data import Subset

from tests.trainer import tiny_run
from unisd.rows import cache as row_cache
from unisd.rows import gate as rows
from unisd.rows.report import _ranges


def plain_rows(count=8):
    return [{"prompt": f"w{5 + i}", "teacher_prompt": f"w{5 + i} w6"} for i in range(count)]


def build(folder, dataset, **overrides):
    options = {"preset": "plain", "per_device_train_batch_size": 1, **overrides}
    evaluation = options.pop("eval_dataset", None)
    return tiny_run.FixedRollouts(
        model=tiny_run.llama(),
        args=tiny_run.config(folder, **options),
        train_dataset=dataset,
        eval_dataset=evaluation,
        processing_class=tiny_run.tokenizer(),
    )


def prompts_of(dataset):
    return [row["prompt"] for row in dataset]


def test_one_report_tells_every_fault_with_the_rows_of_the_file(tmp_path):
    items = [{"prompt": f"w{5 + i}", "privileged_context": "w6", "auxiliary_prompts": ["w7", "w8"]} for i in range(12)]
    items[1]["privileged_context"] = None
    items[4]["auxiliary_prompts"] = ["w7"]
    items[5]["auxiliary_prompts"] = ["w7"]
    items[9]["auxiliary_prompts"] = ["w7"]
    items[7]["auxiliary_prompts"] = ["w7", "  "]
    items[10]["prompt"] = " ".join(["w5"] * 60)
    file = tmp_path / "rows.jsonl"
    Dataset.from_list(items).to_json(file)
    dataset = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "hub"))
    # Row 0 is left out and the others come in another order; the numbers stay those of the file.
    dataset = dataset.filter(lambda row: row["prompt"] != "w5").shuffle(seed=3)
    with pytest.raises(ValueError, match="rows cannot be used") as caught:
        build(tmp_path, dataset, preset="agreement_token", num_auxiliary=2, max_prompt_length=50, overlong="error")
    head, *lines = str(caught.value).splitlines()
    assert head == "train_dataset: 6 of 11 rows cannot be used (rows are counted from 0, as in the file):"
    rows_of = [line.split(":")[0].strip() for line in lines]
    assert rows_of[0] == "3 rows (4-5, 9)"  # the most frequent first
    assert sorted(rows_of[1:]) == ["1 row (1)", "1 row (10)", "1 row (7)"]
    text = str(caught.value)
    assert "(1): column 'teacher_prompt' (or 'privileged_context') is needed" in text
    assert "(7): the auxiliary prompt 1 is empty" in text
    assert "(10): too long, more than max_prompt_length=50; the longest has" in text
    assert "tokens (teacher prompt of row 10)" in text


def test_a_part_of_a_file_is_said_to_be_one(tmp_path):
    items = plain_rows(12)
    items[7]["teacher_prompt"] = ""
    file = tmp_path / "rows.jsonl"
    Dataset.from_list(items).to_json(file)
    dataset = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "hub"))
    with pytest.raises(ValueError, match=r"from 0, from the start of the selected part of the file\):\n  1 row \(5\)"):
        build(tmp_path, dataset.select(range(2, 12)).shuffle(seed=3))
    with pytest.raises(ValueError, match=r"from 0, as in the file\):\n  1 row \(7\)"):
        build(tmp_path, dataset)
    with pytest.raises(ValueError, match=r"from 0, as in the dataset\):\n  1 row \(7\)"):
        build(tmp_path, Dataset.from_list(items))


def test_wrong_types_are_found_at_construction(tmp_path):
    items = [{"prompt": "w5", "privileged_context": i} for i in range(4)]
    with pytest.raises(ValueError, match=r"4 rows \(0-3\): privileged_context must be a string, got int"):
        build(tmp_path, Dataset.from_list(items))


def test_a_template_that_refuses_a_row_is_named_with_it(tmp_path):
    tokenizer = tiny_run.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m['content'] }} {% endfor %}"
    )
    items = [{"prompt": [{"role": "user", "content": "w5"}], "privileged_context": "w6"} for _ in range(4)]
    items[2]["prompt"] = [{"role": "system", "content": "w4"}, *items[2]["prompt"]]
    with pytest.raises(ValueError, match=r"1 row \(2\): the prompt is refused by the chat template \(.*no system role"):
        tiny_run.FixedRollouts(
            model=tiny_run.llama(),
            args=tiny_run.config(tmp_path, preset="plain"),
            train_dataset=Dataset.from_list(items),
            processing_class=tokenizer,
        )


def test_a_token_without_embedding_is_named(tmp_path):
    items = plain_rows()
    items[3]["teacher_prompt"] = "w63"
    with pytest.raises(
        ValueError, match=r"1 row \(3\): the teacher prompt holds token id 63, but the model has 60 emb"
    ):
        tiny_run.trainer(tmp_path, tiny_run.llama(vocab_size=60), preset="plain", items=items)


def test_rows_of_two_forms_are_refused_where_strings_stay_strings(tmp_path):
    # Arrow columns have one type; a list of rows need not.
    items = plain_rows()
    items[6] = {"prompt": [{"role": "user", "content": "w5"}], "privileged_context": "w6"}
    with pytest.raises(ValueError, match=r"1 row \(6\): its prompts are conversations, those of most rows are strings"):
        build(tmp_path, items)
    build(tmp_path, items, prompt_frame="chat")


def test_too_long_rows_are_dropped_before_training(tmp_path, caplog):
    items = plain_rows()
    items[2]["teacher_prompt"] = " ".join(["w6"] * 9)
    items[5]["prompt"] = " ".join(["w6"] * 7)
    run = build(tmp_path, Dataset.from_list(items), max_prompt_length=6, eval_dataset={"held_out": items[4:]})
    assert prompts_of(run.train_dataset) == [f"w{5 + i}" for i in (0, 1, 3, 4, 6, 7)]
    assert isinstance(run.eval_dataset["held_out"], Subset)
    assert prompts_of(run.eval_dataset["held_out"]) == ["w9", "w11", "w12"]
    assert "train_dataset: 2 of 8 rows are dropped" in caplog.text
    assert "The longest has 9 tokens (teacher prompt of row 2).\n  2 rows (2, 5): more than max_prompt_length=6" in (
        caplog.text
    )
    assert "eval_dataset['held_out']: 1 of 4 rows are dropped" in caplog.text
    report = run.rows.reports["train_dataset"]
    assert (sorted(report.overlong), report.kept) == ([2, 5], [0, 1, 3, 4, 6, 7])
    run.train()  # nothing is left that a step could trip over


def test_a_completion_must_fit_too(tmp_path):
    items = plain_rows()
    items[3]["prompt"] = "w5 w5 w5 w5 w5"
    dataset = Dataset.from_list(items)
    # 5 tokens and a completion of 6 are just what 11 positions hold.
    for positions, kept in ((11, 8), (10, 7)):
        run = tiny_run.trainer(
            tmp_path, tiny_run.llama(max_position_embeddings=positions), preset="plain", items=dataset.to_list()
        )
        assert len(run.train_dataset) == kept
    with pytest.raises(
        ValueError, match=r"\(3\): too long, with max_completion_length=6 more than the model's 10 posit"
    ):
        tiny_run.trainer(
            tmp_path, tiny_run.llama(max_position_embeddings=10), preset="plain", items=items, overlong="error"
        )


def test_nothing_but_too_long_rows_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"all 8 rows are too long[^$]*8 rows \(0-7\): .*max_prompt_length=1"):
        build(tmp_path, Dataset.from_list(plain_rows()), max_prompt_length=1)


def test_a_dataset_without_rows_is_an_error(tmp_path):
    empty = Dataset.from_list(plain_rows()).select([])
    with pytest.raises(ValueError, match="eval_dataset has no rows"):
        build(tmp_path, Dataset.from_list(plain_rows()), eval_dataset=empty)


def test_a_dataset_given_to_evaluate_is_checked(tmp_path):
    run = build(tmp_path, Dataset.from_list(plain_rows()), max_prompt_length=6)
    items = plain_rows(4)
    items[1]["prompt"] = " ".join(["w6"] * 7)
    assert run.evaluate(Dataset.from_list(items))["eval_loss"] > 0
    items[2]["teacher_prompt"] = ""
    with pytest.raises(ValueError, match=r"eval_dataset given to evaluate: 1 of 4 .*\n.*\(2\): the teacher prompt is"):
        run.evaluate(Dataset.from_list(items))


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Every check is kept, in a folder of the test; counts the rows that were read."""
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rows, "CACHE_AFTER_SECONDS", -1.0)
    read = []
    measure = rows.RowChecker.measure
    monkeypatch.setattr(
        rows.RowChecker, "measure", lambda self, batch: [read.append(len(batch)), measure(self, batch)][1]
    )
    return read


def test_a_second_start_reads_nothing(tmp_path, cached, caplog):
    items = plain_rows()
    items[2]["teacher_prompt"] = " ".join(["w6"] * 9)

    def kept(items, **overrides):
        cached.clear()
        return len(build(tmp_path, Dataset.from_list(items), **overrides).train_dataset), sum(cached)

    assert kept(items) == (8, 8)
    assert kept(items) == (8, 0)
    assert kept(items, max_prompt_length=6) == (7, 0)  # another limit on the same lengths
    assert kept(items, prompt_frame="chat") == (8, 8)  # another frame
    assert kept(items, preset="match_joint", max_prompt_length=6) == (7, 8)
    changed = [*items[:-1], {**items[-1], "teacher_prompt": " ".join(["w6"] * 8)}]
    assert kept(changed, max_prompt_length=6) == (6, 8)
    for file in (tmp_path / "cache" / "rows").glob("*.npz"):
        file.write_bytes(file.read_bytes()[:100])
    assert kept(items) == (8, 8)
    assert "cannot be read and is made anew" in caplog.text
    assert kept(items) == (8, 0)


def test_faults_are_kept_too(tmp_path, cached):
    items = plain_rows()
    items[2]["teacher_prompt"] = ""
    for expected in (8, 0):
        cached.clear()
        with pytest.raises(ValueError, match=r"1 row \(2\): the teacher prompt is empty"):
            build(tmp_path, Dataset.from_list(items))
        assert sum(cached) == expected


def test_another_tokenizer_has_another_key():
    first, second = tiny_run.tokenizer(), tiny_run.tokenizer()
    assert row_cache._tokenizer_key(first) == row_cache._tokenizer_key(second)
    first(["w5 w6", "w7"], padding=True, truncation=True, max_length=4)  # leaves its settings in the backend
    assert row_cache._tokenizer_key(first) == row_cache._tokenizer_key(second)
    second.add_tokens(["w5 w6"])
    assert row_cache._tokenizer_key(first) != row_cache._tokenizer_key(second)
    second = tiny_run.tokenizer()
    second.chat_template = "{{ messages[0]['content'] }}"
    assert row_cache._tokenizer_key(first) != row_cache._tokenizer_key(second)


def test_a_cache_that_cannot_be_written_is_said(tmp_path, cached, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path / "file"))
    build(tmp_path, Dataset.from_list(plain_rows()))
    assert "is not kept for the next start" in caplog.text


def test_a_stream_is_checked_as_it_is_drawn(tmp_path, caplog):
    items = plain_rows()
    items[1]["teacher_prompt"] = " ".join(["w6"] * 9)
    settings = {"max_prompt_length": 6, "shuffle_dataset": False, "max_steps": 4}

    def stream(items):
        return Dataset.from_list(items).to_iterable_dataset()

    run = build(tmp_path, stream(items), **settings)
    run.train()
    assert len(tiny_run.losses(run)) == 4
    assert "row 1 of the stream is dropped, the 1st so far: it has 9 tokens (teacher prompt of row 1)" in caplog.text
    with pytest.raises(ValueError, match=r"train_dataset: 1 of 1 rows cannot be used[^$]*1 row \(1\): too long"):
        build(tmp_path, stream(items), overlong="error", **settings).train()
    items[3]["teacher_prompt"] = ""
    with pytest.raises(ValueError, match=r"1 row \(3\): the teacher prompt is empty"):
        build(tmp_path, stream(items), **settings).train()


def test_only_what_was_found_is_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="unisd"):
        build(tmp_path, Dataset.from_list(plain_rows()))
    assert "train_dataset: 8 rows checked, the longest view has 2 tokens (teacher prompt of row 0)" in caplog.text
    assert not [
        record for record in caplog.records if record.name.startswith("unisd") and record.levelno > logging.INFO
    ]


def test_ranges():
    assert _ranges([3, 17, 18, 19, 44]) == "3, 17-19, 44"
    assert _ranges(range(0, 100, 2)) == ", ".join(str(i) for i in range(0, 40, 2)) + ", ..."
