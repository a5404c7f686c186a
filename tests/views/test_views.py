"""Packed, shared and cached passes over views against a pass of each row alone; caches and weights that move."""

import random

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tests.trainer import tiny_run
from unisd.modules import backbone
from unisd.views import PrefixCache
from unisd.views.passes import tree_states
from unisd.views.tree import PrefixTree


def gemma():
    """Sliding and full layers, a window shorter than the rows."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=tiny_run.VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        initializer_range=0.2,
        max_position_embeddings=128,
        pad_token_id=tiny_run.PAD,
        eos_token_id=tiny_run.EOS,
    )
    return Gemma3ForCausalLM(config)


MODELS = [tiny_run.llama, tiny_run.gpt2, gemma]


def random_rows(seed):
    """Rows of 1 to 50 tokens that begin with all, half or none of 40 shared tokens; one twice, one a beginning."""
    draw = random.Random(seed)
    shared = [draw.randrange(3, 60) for _ in range(40)]
    rows = [
        tuple(shared[: draw.choice([40, 20, 0])] + [draw.randrange(3, 60) for _ in range(draw.randrange(1, 11))])
        for _ in range(7)
    ]
    return [*rows, rows[0], tuple(shared[:30]), (*shared, 5)]


def alone(model, row):
    return backbone(model)(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("make", MODELS)
@torch.no_grad()
def test_states_of_a_tree_are_those_of_each_row_alone(make, share):
    model = make().double().eval()
    for seed in range(3):
        rows = random_rows(seed)
        tree = PrefixTree.of(rows, share=share)
        assert (len(tree.tokens) < sum(map(len, rows))) == share
        states, _ = tree_states(model, tree)
        for row, path in zip(rows, tree.paths, strict=True):
            torch.testing.assert_close(states[path], alone(model, row), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", MODELS)
@torch.no_grad()
def test_states_after_cached_prefixes_are_those_of_each_row_alone(make):
    model = make().double().eval()
    rows = random_rows(0)
    prefixes = [rows[-1][:40], rows[-1][:20]]
    first = PrefixTree.of(prefixes)
    _, cached = tree_states(model, first, captured=torch.cat(first.paths))
    of_row = [
        next((i for i, p in enumerate(prefixes) if row[: len(p)] == p and len(row) > len(p)), None) for row in rows
    ]
    assert {0, 1, None} == set(of_row)
    tree = PrefixTree.of(rows, prefixes, of_row)
    states, _ = tree_states(model, tree, cached=cached)
    for row, path, prefix in zip(rows, tree.paths, of_row, strict=True):
        skipped = 0 if prefix is None else len(prefixes[prefix])
        expected = alone(model, row)[skipped:]
        torch.testing.assert_close(states[path[skipped:] - tree.num_cached], expected, rtol=1e-10, atol=1e-10)


def pooled_rows():
    """Auxiliary contexts that begin with one of two sets of 70 tokens."""
    rows = tiny_run.rows()
    for place, row in enumerate(rows):
        row["auxiliary_prompts"] = [
            f"{tiny_run.words(5 * (k % 2), 70)} {tiny_run.words(3 * place, 3 + place)}" for k in range(3)
        ]
    return rows


@pytest.mark.parametrize(
    ("make", "passes", "fraction"),
    [
        (tiny_run.llama, "prefix", 0.5),
        (gemma, "packed", 1.0),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in [
                (tiny_run.llama, "packed", 1.0),
                (tiny_run.llama, "packed", 0.5),
                (tiny_run.llama, "prefix", 1.0),
                (gemma, "packed", 0.5),
                (gemma, "prefix", 1.0),
                (gemma, "prefix", 0.5),
            ]
        ),
    ],
)
def test_training_with_packed_passes_takes_the_padded_steps(tmp_path, make, passes, fraction):
    """Four steps of micro-batches of one or two rows; every gradient is compared, so a stale cache would show."""

    def train(view_passes, size):
        gradients, model = tiny_run.Gradients(), make()
        run = tiny_run.trainer(
            tmp_path,
            model,
            items=pooled_rows(),
            preset="unisd_star",
            agreement_gamma=2.0,
            agreement_fraction=fraction,
            ema_decay=0.5,
            sync_steps=2,
            max_steps=4,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            view_passes=view_passes,
            learning_rate=0.01,
        )
        run.add_callback(gradients)
        run.train()
        return run, gradients.steps

    for size in (1, 2):
        _, expected = train("padded", size)
        run, actual = train(passes, size)
        assert run.step.views.passes == passes
        assert (run.step.views.cache.hits > 0) == (passes == "prefix")
        for one, other in zip(actual, expected, strict=True):
            tiny_run.assert_same_gradients(one, other, 2e-4)


@pytest.mark.parametrize("setting", [{"ema": "none"}, {"ema": "full"}, {"teacher": "base", "ema": "none"}])
def test_what_was_kept_is_dropped_when_the_weights_that_score_move(tmp_path, setting):
    run = tiny_run.trainer(tmp_path, tiny_run.llama(), preset="sdft", max_steps=2, sync_steps=1, **setting)
    teacher, model = run.teacher, run.model
    before = teacher.version(model)
    assert teacher.version(model) == before
    run.train()
    moved = teacher.version(model) != before
    assert moved == (setting.get("teacher") != "base")
    if setting["ema"] == "full":
        before = teacher.version(model)
        teacher.load_state_dict(teacher.state_dict())
        assert teacher.version(model) != before
    cache = PrefixCache(2**20)
    cache.begin(before)
    cache.put((1, 2), [(torch.zeros(2, 1, 1), torch.zeros(2, 1, 1))])
    cache.begin(before)
    assert cache.match([(1, 2, 3)])[0] == [(1, 2)]
    cache.begin(("another",))
    assert cache.match([(1, 2, 3)])[0] == []


def test_the_cache_stays_within_its_bytes_and_says_so():
    cache = PrefixCache(100)
    values = [(torch.zeros(5, 1, 1), torch.zeros(5, 1, 1))]  # 40 bytes
    cache.put((1,), values)
    cache.put((2,), values)
    cache.get([(1,)])
    with pytest.warns(UserWarning, match="view_cache_bytes=100"):
        cache.put((3,), values)
    assert cache.match([(1, 0), (2, 0), (3, 0)])[1] == [0, None, 1]
    assert cache.evicted == 1


def test_a_prefix_is_known_once_two_rows_begin_with_it():
    shared, cache = tuple(range(100, 180)), PrefixCache(100)
    cache.observe([(*shared, 1, 2)])
    assert cache.missing([(*shared, 3)]) == {}
    cache.observe([(*shared, 1, 5)])  # by chance these two share one more
    cache.observe([(*shared, 7, 5)])
    assert cache.missing([(*shared, 3), (1, 2)]) == {shared: 0}
    assert cache.missing([shared]) == {}  # the state after a context is never in the cache


def test_models_without_a_tree_are_scored_in_padded_passes_or_refused(tmp_path):
    run = tiny_run.trainer(tmp_path, _with_a_layer_of_its_own(), preset="sdft")
    with pytest.warns(UserWarning, match="padded passes"):
        run.train()
    assert run.step.views.passes == "padded"
    with pytest.raises(ValueError, match="view_passes='prefix', but"):
        tiny_run.trainer(tmp_path, _with_a_layer_of_its_own(), preset="sdft", view_passes="prefix").train()


def _with_a_layer_of_its_own():
    """A model one of whose layers does not go through the attention interface."""
    model = tiny_run.llama()
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **kwargs: (torch.zeros_like(hidden_states), None)
    return model
