"""Columns, prompts of the views, lengths."""

import pytest
import torch
from datasets import Dataset

from tests.trainer import tiny_run
from unisd.contexts import (
    ContextSpec,
    LengthLimit,
    TeacherTemplate,
    build_teacher_prompt,
    collect_views,
    tokenize_views,
)

NEEDS = [
    ("plain", "prompt"),
    ("plain", "teacher_prompt"),
    ("agreement_token", "auxiliary_prompts"),
    ("agreement_sequence", "auxiliary_prompts"),
    ("contrastive", "negative_prompt"),
    ("unisd_star", "teacher_prompt"),
    ("unisd_star", "auxiliary_prompts"),
    ("unisd_star", "negative_prompt"),
]


@pytest.mark.parametrize(("preset", "column"), NEEDS)
def test_missing_column_is_named_at_construction(tmp_path, preset, column):
    items = [{name: value for name, value in row.items() if name != column} for row in tiny_run.rows()]
    with pytest.raises(ValueError, match=f"column '{column}'.*preset '{preset}'.*train_dataset"):
        tiny_run.trainer(tmp_path, preset=preset, items=items)


@pytest.mark.parametrize("as_dict", [False, True])
def test_evaluation_columns_are_checked_too(tmp_path, as_dict):
    items = [{name: value for name, value in row.items() if name != "negative_prompt"} for row in tiny_run.rows()]
    evaluation = Dataset.from_list(items)
    with pytest.raises(ValueError, match=r"column 'negative_prompt'.*eval_dataset"):
        tiny_run.FixedRollouts(
            model=tiny_run.llama(),
            args=tiny_run.config(tmp_path, preset="contrastive"),
            train_dataset=tiny_run.dataset(),
            eval_dataset={"held_out": evaluation} if as_dict else evaluation,
            processing_class=tiny_run.tokenizer(),
        )


@pytest.mark.parametrize("column", ["teacher_prompt", "auxiliary_prompts", "negative_prompt"])
def test_empty_value_is_named_at_the_batch(column):
    items = tiny_run.rows()
    items[2][column] = None
    spec = ContextSpec(num_auxiliary=3, negative=True, preset="unisd_star")
    with pytest.raises(ValueError, match=f"row 2 of the batch: column '{column}' "):
        collect_views(items, spec)


def test_columns_of_unused_mechanisms_are_not_needed(tmp_path):
    items = [{"prompt": row["prompt"], "teacher_prompt": row["teacher_prompt"]} for row in tiny_run.rows()]
    run = tiny_run.trainer(tmp_path, preset="match_joint", items=items)
    run.train()
    assert len(tiny_run.losses(run)) == 1


def test_columns_survive_remove_unused_columns(tmp_path):
    run = tiny_run.trainer(tmp_path, preset="unisd_star", remove_unused_columns=True)
    run.train()
    assert len(tiny_run.losses(run)) == 1


def test_number_of_auxiliary_prompts_must_match(tmp_path):
    items = tiny_run.rows()
    items[1]["auxiliary_prompts"] = items[1]["auxiliary_prompts"][:2]
    with pytest.raises(ValueError, match=r"1 row \(1\): the row has 2 'auxiliary_prompts' but num_auxiliary is 3"):
        tiny_run.trainer(tmp_path, preset="agreement_token", items=items)
    items = tiny_run.rows(num_auxiliary=4)
    with pytest.raises(ValueError, match=r"4 rows \(0-3\): the row has 4 'auxiliary_prompts' but num_auxiliary is 3"):
        tiny_run.trainer(tmp_path, preset="agreement_token", items=items)


def test_privileged_context_is_put_into_the_template():
    expected = TeacherTemplate().fill("why?", "because {braces} stay")
    assert build_teacher_prompt("why?", "because {braces} stay") == expected
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "why?"}]
    built = build_teacher_prompt(messages, "because {braces} stay")
    assert built == [messages[0], {"role": "user", "content": expected}]
    assert messages[1]["content"] == "why?"  # the row itself is left alone


def test_privileged_context_needs_a_final_user_message():
    with pytest.raises(ValueError, match="ends with a user message"):
        build_teacher_prompt([{"role": "assistant", "content": "hm"}], "x")
    with pytest.raises(ValueError, match="ends with a user message"):
        build_teacher_prompt([{"role": "user", "content": [{"type": "text", "text": "hm"}]}], "x")
    with pytest.raises(TypeError, match="privileged_context must be a string"):
        build_teacher_prompt("why?", ["a"])


def test_teacher_prompt_goes_before_privileged_context():
    spec = ContextSpec(num_auxiliary=0, negative=False, preset="plain")
    rows = [
        {"prompt": "p", "teacher_prompt": "t", "privileged_context": "c"},
        {"prompt": "p", "teacher_prompt": None, "privileged_context": "c"},
    ]
    assert collect_views(rows, spec).teacher == ["t", build_teacher_prompt("p", "c")]


def test_conversations_get_the_chat_template(tmp_path):
    """The teacher's ids are those of the tokenizer's own chat template with a generation prompt."""
    conversation = [{"role": "user", "content": "w10 w11"}]
    items = [{"prompt": conversation, "privileged_context": f"w{20 + i}"} for i in range(4)]
    run = tiny_run.trainer(tmp_path, preset="plain", items=items, shuffle_dataset=False)
    seen = run._generate_and_score_completions(items)
    tokenizer = tiny_run.tokenizer()
    for i, item in enumerate(items):
        prompt = build_teacher_prompt(conversation, item["privileged_context"])
        expected = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        assert seen["teacher_prompt_ids"][i][seen["teacher_prompt_mask"][i] == 1].tolist() == expected
    run.train()


def test_views_are_left_padded_tensors_with_the_batch_first():
    spec = ContextSpec(num_auxiliary=2, negative=True, preset="unisd_star")
    rows = tiny_run.rows(num_auxiliary=2)
    out = tokenize_views(
        collect_views(rows, spec),
        lambda prompts: [tiny_run.tokenized(prompt) for prompt in prompts],
        LengthLimit(None, None),
        pad_token_id=tiny_run.PAD,
    )
    assert {name: tensor.shape[:-1] for name, tensor in out.items() if name.endswith("ids")} == {
        "teacher_prompt_ids": (4,),
        "auxiliary_prompt_ids": (4, 2),
        "negative_prompt_ids": (4,),
    }
    for b, row in enumerate(rows):
        for k in range(2):
            ids, mask = out["auxiliary_prompt_ids"][b, k], out["auxiliary_prompt_mask"][b, k]
            expected = tiny_run.tokenized(row["auxiliary_prompts"][k])
            assert ids[-len(expected) :].tolist() == expected
            assert mask.tolist() == [0] * (len(ids) - len(expected)) + [1] * len(expected)
            assert torch.all(ids[: -len(expected)] == tiny_run.PAD)


def test_contexts_are_never_truncated():
    """What the batch is held to, before its rollout: for streams the only check."""
    views = collect_views(tiny_run.rows(), ContextSpec(num_auxiliary=0, negative=False, preset="plain"))

    def tokenized(limit):
        return tokenize_views(
            views, lambda prompts: [tiny_run.tokenized(prompt) for prompt in prompts], limit, pad_token_id=tiny_run.PAD
        )

    # Prompts have 2 to 5 tokens, teacher prompts 4, 7, 5 and 8.
    with pytest.raises(ValueError, match=r"teacher prompt of row 1 of the batch has 7 tokens.*max_prompt_length=6"):
        tokenized(LengthLimit(6, None))
    with pytest.raises(ValueError, match=r"the prompt of row 2 of the batch has 4 tokens.*max_prompt_length=3"):
        tokenized(LengthLimit(3, None))
    with pytest.raises(ValueError, match="has 8 tokens, with max_completion_length=3 more than the model's 10 posit"):
        tokenized(LengthLimit(None, 10, completion=3))
    with pytest.raises(ValueError, match=r"the prompt of row 3.* has 5 tokens, .* more than vllm_max_model_length=7"):
        tokenized(LengthLimit(None, 11, completion=3, rollout=7))
    assert tokenized(LengthLimit(8, 11, completion=3, rollout=8))["teacher_prompt_ids"].shape == (4, 8)


def test_mixed_forms_in_one_view_are_refused():
    spec = ContextSpec(num_auxiliary=0, negative=False, preset="plain")
    rows = [
        {"prompt": "w5", "teacher_prompt": "w5"},
        {"prompt": [{"role": "user", "content": "w5"}], "teacher_prompt": [{"role": "user", "content": "w5"}]},
    ]
    with pytest.raises(ValueError, match="prompts of one batch mix strings and conversations"):
        tokenize_views(collect_views(rows, spec), lambda p: [[1]] * 2, LengthLimit(None, None), pad_token_id=0)
