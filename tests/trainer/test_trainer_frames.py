"""One frame for all views of a row: inside the chat template or outside."""

import pytest

from tests.trainer import tiny_run
from unisd.contexts import ContextSpec, collect_views
from unisd.contexts.frame import PromptFrame

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = {"role": "system", "content": "w40"}


def user(text):
    return {"role": "user", "content": text}


def chat_frame(template=CHATML):
    tokenizer = tiny_run.tokenizer()
    tokenizer.chat_template = template
    return PromptFrame.of("auto", tokenizer)


def ids_of(output, name):
    return [ids[mask == 1].tolist() for ids, mask in zip(output[f"{name}_ids"], output[f"{name}_mask"], strict=True)]


def templated(messages):
    return tiny_run.tokenizer().apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def test_strings_go_where_the_prompt_stands():
    frame = chat_frame()
    assert frame.apply({"prompt": "q", "teacher prompt": "t", "auxiliary prompt 0": [SYSTEM, user("a")]}) == {
        "prompt": [user("q")],
        "teacher prompt": [user("t")],
        "auxiliary prompt 0": [SYSTEM, user("a")],
    }
    before = [SYSTEM, user("old"), {"role": "assistant", "content": "hm"}]
    views = frame.apply({"prompt": [*before, user("q")], "teacher prompt": "t"})
    assert views == {"prompt": [*before, user("q")], "teacher prompt": [*before, user("t")]}
    with pytest.raises(ValueError, match=r"negative prompt is a string, which can only .* role is 'assistant'"):
        frame.apply({"prompt": before, "teacher prompt": before, "negative prompt": "n"})


def test_given_frame_refuses_a_mixture_by_row_and_view():
    spec = ContextSpec(num_auxiliary=1, negative=False, preset="agreement_token")
    good = {"prompt": "w5", "teacher_prompt": "w6", "auxiliary_prompts": ["w7"]}
    bad = {**good, "auxiliary_prompts": [[user("w7")]]}
    with pytest.raises(
        ValueError, match="row 1 of the batch: the auxiliary prompt 0 is a conversation while the prompt"
    ):
        collect_views([good, bad], spec, PromptFrame("given"))
    bad = {"prompt": [user("w5")], "teacher_prompt": "w6", "auxiliary_prompts": [[user("w7")]]}
    with pytest.raises(ValueError, match=r"row 0 of the batch: the teacher prompt is a string .*prompt_frame='chat'"):
        collect_views([bad], spec, PromptFrame("given"))


def test_a_tokenizer_without_template_has_no_conversations():
    tokenizer = tiny_run.tokenizer()
    tokenizer.chat_template = None
    frame = PromptFrame.of("auto", tokenizer)
    assert frame.apply({"prompt": "q", "teacher prompt": "t"}) == {"prompt": "q", "teacher prompt": "t"}
    with pytest.raises(ValueError, match="teacher prompt is a conversation, but the tokenizer has no chat template"):
        frame.apply({"prompt": "q", "teacher prompt": [user("t")]})
    with pytest.raises(ValueError, match="prompt_frame='chat' puts prompts into the chat template"):
        PromptFrame.of("chat", tokenizer)


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize(
    "template",
    [CHATML, "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"],
)
def test_the_template_is_not_applied_twice(template, generation):
    tokenizer = tiny_run.tokenizer()
    tokenizer.chat_template = template
    rendered = tokenizer.apply_chat_template([user("q")], tokenize=False, add_generation_prompt=generation)
    views = {"prompt": "q", "teacher prompt": rendered}
    with pytest.raises(ValueError, match="teacher prompt is a string to which the chat template was applied already"):
        chat_frame(template).apply(views)
    assert PromptFrame("given").apply(views) == views


@pytest.mark.parametrize(
    ("value", "got"),
    [(3, "int 3"), ([], "a list of 0"), (["a"], "a list of 1 str"), ([{"role": "user"}], "a list of 1 dict")],
)
def test_other_types_are_named(value, got):
    with pytest.raises(TypeError, match=f"the negative prompt must be a string or a list of messages .*got {got}"):
        chat_frame().apply({"prompt": "q", "negative prompt": value})


def test_blank_text_is_empty():
    with pytest.raises(ValueError, match="the teacher prompt is empty"):
        chat_frame().apply({"prompt": "q", "teacher prompt": " \n"})


def test_student_and_teacher_read_the_same_frame(tmp_path):
    """The case that was trained on in silence: the student inside the template, its teacher outside."""
    items = [{"prompt": [SYSTEM, user(f"w{5 + i}")], "teacher_prompt": f"w{5 + i} w20"} for i in range(4)]
    run = tiny_run.trainer(tmp_path, preset="plain", items=items, prompt_frame="auto")
    output = run._generate_and_score_completions(items)
    assert ids_of(output, "prompt") == [templated([SYSTEM, user(f"w{5 + i}")]) for i in range(4)]
    assert ids_of(output, "teacher_prompt") == [templated([SYSTEM, user(f"w{5 + i} w20")]) for i in range(4)]
    with pytest.raises(ValueError, match=r"4 rows \(0-3\): the teacher prompt is a string while the prompt is a conv"):
        tiny_run.trainer(tmp_path, preset="plain", items=items, prompt_frame="given")


def test_strings_are_templated_and_that_is_said(tmp_path, caplog):
    run = tiny_run.trainer(tmp_path, preset="unisd_star", prompt_frame="auto")
    assert "train_dataset: prompts and contexts that are strings go into the user message" in caplog.text
    items = tiny_run.rows()
    output = run._generate_and_score_completions(items)
    assert ids_of(output, "prompt") == [templated([user(row["prompt"])]) for row in items]
    assert ids_of(output, "negative_prompt") == [templated([user(row["negative_prompt"])]) for row in items]
    for k in range(3):
        mask = output["auxiliary_prompt_mask"][:, k] == 1
        got = [ids[kept].tolist() for ids, kept in zip(output["auxiliary_prompt_ids"][:, k], mask, strict=True)]
        assert got == [templated([user(row["auxiliary_prompts"][k])]) for row in items]
    caplog.clear()
    run = tiny_run.trainer(tmp_path, preset="unisd_star", prompt_frame="given")
    assert "user message" not in caplog.text
    assert ids_of(run._generate_and_score_completions(items), "prompt") == [
        tiny_run.tokenized(row["prompt"]) for row in items
    ]
